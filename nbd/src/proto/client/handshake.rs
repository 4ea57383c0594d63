use std::collections::VecDeque;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::info::{InfoCollector, string};
use super::option_reply::{self, OptionReply};
use super::{ExportInfo, HandshakeError, ListedExport};
use crate::proto::wire::{
    ClientFlags, EXPORT_NAME_PADDING, HandshakeFlags, INIT_MAGIC, InfoType, OLDSTYLE_MAGIC,
    OPTION_MAGIC, OptionCode, OptionHeader, PRIVATE_REPLY, Reader, ReplyType, STRING_LEN_MAX,
    TransmissionFlags, TransmissionMode,
};

/// Most replies that one option may have.
const REPLIES_MAX: usize = 10_000;

/// What a handshake is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// Enter transmission.
    Transmit,
    /// Describe the export, then leave.
    Describe,
    /// List the exports, then leave.
    List,
    /// Carry out the private options, and leave the rest of the connection to the caller.
    Private,
}

/// What a client wants of a server.
#[derive(Debug, Clone)]
pub struct HandshakeOptions {
    /// What the handshake is for.
    pub goal: Goal,
    /// Name of the export; empty for the default one.
    pub export: String,
    /// Options outside the protocol, with their data, sent first and in this order. A server that
    /// refuses one ends the handshake.
    pub private_options: Vec<(OptionCode, Bytes)>,
    /// The best mode to ask for; a server that does not have it is asked for the next one. With
    /// simple replies, reads cannot have holes and every range counts as data.
    pub mode_max: TransmissionMode,
    /// The meta contexts in which the state of ranges is asked for; usually
    /// [`BASE_ALLOCATION`](crate::proto::wire::BASE_ALLOCATION) alone.
    pub contexts: Vec<String>,
    /// Begin TLS before anything else, and end if that is not possible.
    pub tls: bool,
}

/// What a handshake has led to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// The export: set by [`Goal::Transmit`] and [`Goal::Describe`].
    pub export: Option<ExportInfo>,
    /// How requests and replies are laid out.
    pub mode: TransmissionMode,
    /// Those of the meta contexts that were asked for that the server has: set by
    /// [`Goal::Transmit`].
    pub selected: Vec<SelectedContext>,
    /// The meta contexts that the export has: set by [`Goal::Describe`].
    pub contexts: Vec<String>,
    /// The answers to the private options, in their order; empty where there was none.
    pub private_replies: Vec<Bytes>,
    /// The exports: set by [`Goal::List`].
    pub exports: Vec<ListedExport>,
}

/// A meta context that both sides have agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SelectedContext {
    /// How replies speak of it; unique on the connection.
    pub id: u32,
    /// Its whole name.
    pub name: String,
}

/// How far a handshake has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// It waits for what the server sends.
    Input,
    /// TLS has to begin now, then [`Handshake::tls_started`].
    StartTls,
    /// It is done: what is left of the input belongs to what comes after it.
    Done(Outcome),
}

/// A client's handshake: fed with what the server sends, it says what to send and when it is
/// done.
///
/// Loop: send what [`take_output`](Self::take_output) returns, call
/// [`advance`](Self::advance) with all that has been received, and do what it returns. After an
/// error, send [`abort`](Self::abort) if there is still somebody to send it to.
#[derive(Debug)]
pub struct Handshake {
    options: HandshakeOptions,
    plan: VecDeque<Step>,
    state: State,
    fixed: bool,
    no_zeroes: bool,
    info: InfoCollector,
    replies: usize,
    output: BytesMut,
    outcome: Outcome,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting,
    Asking(Step),
    /// TLS is being begun.
    Securing,
    Done,
}

/// One option, and what its replies mean to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    StartTls,
    /// Index into the private options.
    Private(usize),
    ExtendedHeaders,
    StructuredReplies,
    SelectContexts,
    ListContexts,
    Go,
    Describe,
    List,
    /// A list that only tells whether there is the export, for servers without `GO`.
    Lookup,
    ExportName,
}

impl Handshake {
    /// Nothing has been received and nothing is to be sent yet.
    #[must_use]
    pub fn new(options: HandshakeOptions) -> Self {
        let mut plan: VecDeque<Step> = options.tls.then_some(Step::StartTls).into_iter().collect();
        plan.extend((0..options.private_options.len()).map(Step::Private));
        let opens = matches!(options.goal, Goal::Transmit | Goal::Describe);
        if opens && options.mode_max.is_extended() {
            plan.push_back(Step::ExtendedHeaders);
        }
        if opens && options.mode_max.is_structured() {
            plan.push_back(Step::StructuredReplies);
            match options.goal {
                Goal::Transmit if options.contexts.is_empty() => {}
                Goal::Transmit => plan.push_back(Step::SelectContexts),
                _ => plan.push_back(Step::ListContexts),
            }
        }
        match options.goal {
            Goal::Transmit => plan.push_back(Step::Go),
            Goal::Describe => plan.push_back(Step::Describe),
            Goal::List => plan.push_back(Step::List),
            Goal::Private => {}
        }
        Handshake {
            options,
            plan,
            state: State::Greeting,
            fixed: false,
            no_zeroes: false,
            info: InfoCollector::default(),
            replies: 0,
            output: BytesMut::new(),
            outcome: Outcome::default(),
        }
    }

    /// What is to be sent now; empty if nothing is.
    pub fn take_output(&mut self) -> Bytes {
        self.output.split().freeze()
    }

    /// What ends the handshake politely; empty if the server would not understand it.
    #[must_use]
    pub fn abort(&self) -> Bytes {
        match self.state {
            State::Asking(step) if self.fixed && step != Step::ExportName => {
                let header = OptionHeader { option: OptionCode::ABORT, len: 0 };
                Bytes::copy_from_slice(&header.encode())
            }
            _ => Bytes::new(),
        }
    }

    /// The option in progress has no way to say no: a server that does not have the export can
    /// only close the connection.
    #[must_use]
    pub fn asks_by_name_only(&self) -> bool {
        self.state == State::Asking(Step::ExportName)
    }

    /// Takes all complete messages off the front of `input`.
    ///
    /// # Errors
    /// The server refuses what we need, or breaks the protocol. Neither can be mended on this
    /// connection.
    pub fn advance(&mut self, input: &mut BytesMut) -> Result<Progress, HandshakeError> {
        loop {
            let progress = match self.state {
                State::Greeting => self.greeting(input)?,
                State::Asking(Step::ExportName) => self.export_name_reply(input)?,
                State::Asking(step) => match option_reply::take(input, self.option(step))? {
                    Some(reply) => self.reply(step, &reply).map(|()| true)?,
                    None => false,
                },
                // The server waits for TLS now; so somebody else has sent this.
                State::Securing if !input.is_empty() => return Err(HandshakeError::ClearText),
                State::Securing => return Ok(Progress::StartTls),
                State::Done => return Ok(Progress::Done(std::mem::take(&mut self.outcome))),
            };
            if !progress {
                return Ok(Progress::Input);
            }
        }
    }

    /// TLS is in use from now on.
    pub fn tls_started(&mut self) {
        if self.state == State::Securing {
            self.next_step();
        }
    }

    fn greeting(&mut self, input: &mut BytesMut) -> Result<bool, HandshakeError> {
        let mut reader = Reader::new(input);
        let Some(init) = reader.u64() else { return Ok(false) };
        if init != INIT_MAGIC {
            return Err(HandshakeError::NotNbd(init));
        }
        let Some(style) = reader.u64() else { return Ok(false) };
        if style == OLDSTYLE_MAGIC {
            return Err(HandshakeError::Oldstyle);
        }
        if style != OPTION_MAGIC {
            return Err(HandshakeError::NotNbd(style));
        }
        let Some(flags) = reader.u16() else { return Ok(false) };
        input.advance(18);
        let flags = HandshakeFlags(flags);
        self.fixed = flags.contains(HandshakeFlags::FIXED_NEWSTYLE);
        self.no_zeroes = flags.contains(HandshakeFlags::NO_ZEROES);
        let answer = ClientFlags::NONE
            .with_if(self.fixed, ClientFlags::FIXED_NEWSTYLE)
            .with_if(self.no_zeroes, ClientFlags::NO_ZEROES);
        self.output.put_u32(answer.0);
        if self.options.export.len() > STRING_LEN_MAX {
            return Err(HandshakeError::ExportNameTooLong(self.options.export.len()));
        }
        if !self.fixed {
            self.plan_without_fixed_newstyle()?;
        }
        self.next_step();
        Ok(true)
    }

    /// Such a server knows `EXPORT_NAME` only, and drops the connection at anything else.
    fn plan_without_fixed_newstyle(&mut self) -> Result<(), HandshakeError> {
        let needs = match self.options.goal {
            _ if self.options.tls => Some(OptionCode::STARTTLS),
            Goal::Describe => Some(OptionCode::INFO),
            Goal::List => Some(OptionCode::LIST),
            Goal::Transmit | Goal::Private => {
                self.options.private_options.first().map(|(option, _)| *option)
            }
        };
        if let Some(option) = needs {
            return Err(HandshakeError::NotFixedNewstyle(option));
        }
        self.plan = VecDeque::from([Step::ExportName]);
        Ok(())
    }

    fn next_step(&mut self) {
        let Some(step) = self.plan.pop_front() else {
            if matches!(self.options.goal, Goal::List | Goal::Describe) {
                self.ask(OptionCode::ABORT, &[]);
            }
            self.state = State::Done;
            return;
        };
        self.state = State::Asking(step);
        self.replies = 0;
        let option = self.option(step);
        let data = self.option_data(step);
        self.ask(option, &data);
    }

    fn ask(&mut self, option: OptionCode, data: &[u8]) {
        // Private data is bounded by its maker, everything else by the length of a name.
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        self.output.put_slice(&OptionHeader { option, len }.encode());
        self.output.put_slice(data);
    }

    fn option(&self, step: Step) -> OptionCode {
        match step {
            Step::StartTls => OptionCode::STARTTLS,
            Step::Private(index) => {
                self.options.private_options.get(index).map_or(OptionCode::ABORT, |o| o.0)
            }
            Step::ExtendedHeaders => OptionCode::EXTENDED_HEADERS,
            Step::StructuredReplies => OptionCode::STRUCTURED_REPLY,
            Step::SelectContexts => OptionCode::SET_META_CONTEXT,
            Step::ListContexts => OptionCode::LIST_META_CONTEXT,
            Step::Go => OptionCode::GO,
            Step::Describe => OptionCode::INFO,
            Step::List | Step::Lookup => OptionCode::LIST,
            Step::ExportName => OptionCode::EXPORT_NAME,
        }
    }

    fn option_data(&self, step: Step) -> Bytes {
        let name = self.options.export.as_bytes();
        let mut data = BytesMut::new();
        let put_string = |data: &mut BytesMut, text: &[u8]| {
            data.put_u32(text.len() as u32);
            data.put_slice(text);
        };
        match step {
            Step::Private(index) => {
                let option = self.options.private_options.get(index);
                return option.map(|option| option.1.clone()).unwrap_or_default();
            }
            Step::StartTls
            | Step::ExtendedHeaders
            | Step::StructuredReplies
            | Step::List
            | Step::Lookup => {}
            Step::SelectContexts => {
                put_string(&mut data, name);
                data.put_u32(self.options.contexts.len() as u32);
                for context in &self.options.contexts {
                    put_string(&mut data, context.as_bytes());
                }
            }
            Step::ListContexts => {
                put_string(&mut data, name);
                data.put_u32(0);
            }
            Step::Go | Step::Describe => {
                let wanted = [InfoType::BLOCK_SIZE, InfoType::NAME, InfoType::DESCRIPTION];
                put_string(&mut data, name);
                data.put_u16(wanted.len() as u16);
                wanted.iter().for_each(|info| data.put_u16(info.0));
            }
            Step::ExportName => data.put_slice(name),
        }
        data.freeze()
    }

    fn reply(&mut self, step: Step, reply: &OptionReply) -> Result<(), HandshakeError> {
        let option = self.option(step);
        self.replies += 1;
        if self.replies > REPLIES_MAX {
            return Err(HandshakeError::TooManyReplies(option));
        }
        if reply.kind.is_error() {
            return self.error_reply(step, reply);
        }
        if reply.kind == ReplyType::ACK {
            reply.check_empty()?;
            return self.acknowledged(step);
        }
        match (step, reply.kind) {
            (Step::Private(index), PRIVATE_REPLY) => self.private_reply(index, reply),
            (Step::SelectContexts | Step::ListContexts, ReplyType::META_CONTEXT) => {
                self.meta_context(step, &reply.data)
            }
            (Step::Go | Step::Describe, ReplyType::INFO) => self.info.take(&reply.data),
            (Step::List | Step::Lookup, ReplyType::SERVER) => {
                self.outcome.exports.push(listed_export(&reply.data)?);
                Ok(())
            }
            _ => Err(reply.unexpected(option)),
        }
    }

    fn acknowledged(&mut self, step: Step) -> Result<(), HandshakeError> {
        match step {
            Step::StartTls => {
                self.state = State::Securing;
                return Ok(());
            }
            Step::Private(index) => {
                if self.outcome.private_replies.len() == index {
                    self.outcome.private_replies.push(Bytes::new());
                }
            }
            Step::ExtendedHeaders => {
                self.outcome.mode = TransmissionMode::Extended;
                self.plan.retain(|step| *step != Step::StructuredReplies);
            }
            Step::StructuredReplies => self.outcome.mode = TransmissionMode::Structured,
            Step::Go | Step::Describe => self.export_known()?,
            Step::Lookup => {
                let exports = std::mem::take(&mut self.outcome.exports);
                let name = &self.options.export;
                // The empty name stands for the default export and need not be listed.
                if !name.is_empty() && exports.iter().all(|export| export.name != *name) {
                    return Err(HandshakeError::NotListed(name.clone()));
                }
            }
            Step::SelectContexts | Step::ListContexts | Step::List | Step::ExportName => {}
        }
        self.next_step();
        Ok(())
    }

    fn error_reply(&mut self, step: Step, reply: &OptionReply) -> Result<(), HandshakeError> {
        let refusal = reply.refusal(self.option(step));
        let fatal = matches!(reply.kind, ReplyType::ERR_TLS_REQD | ReplyType::ERR_SHUTDOWN);
        match step {
            Step::StartTls => return Err(reply.tls_refused()),
            // What we can do without.
            Step::ExtendedHeaders if !fatal => {}
            Step::StructuredReplies if !fatal => {
                self.plan.retain(|step| !matches!(step, Step::SelectContexts | Step::ListContexts));
            }
            Step::SelectContexts if !fatal => self.outcome.selected.clear(),
            Step::ListContexts if !fatal => self.outcome.contexts.clear(),
            Step::Lookup if !fatal => self.outcome.exports.clear(),
            // After extended headers an export cannot be chosen in another way.
            Step::Go if reply.kind == ReplyType::ERR_UNSUP && !self.outcome.mode.is_extended() => {
                self.info = InfoCollector::default();
                self.plan.extend([Step::Lookup, Step::ExportName]);
            }
            _ => return Err(refusal),
        }
        self.next_step();
        Ok(())
    }

    fn private_reply(&mut self, index: usize, reply: &OptionReply) -> Result<(), HandshakeError> {
        if self.outcome.private_replies.len() != index {
            return Err(HandshakeError::TooManyReplies(self.option(Step::Private(index))));
        }
        self.outcome.private_replies.push(reply.data.clone());
        Ok(())
    }

    fn meta_context(&mut self, step: Step, data: &[u8]) -> Result<(), HandshakeError> {
        let malformed = HandshakeError::Malformed("META_CONTEXT reply");
        let mut reader = Reader::new(data);
        let Some(id) = reader.u32() else { return Err(malformed) };
        if step == Step::ListContexts {
            self.outcome.contexts.push(string(reader.rest(), "META_CONTEXT reply")?);
            return Ok(());
        }
        let name = reader.rest();
        let Some(name) = self.options.contexts.iter().find(|wanted| wanted.as_bytes() == name)
        else {
            return Err(malformed);
        };
        let selected = &mut self.outcome.selected;
        if selected.iter().any(|context| context.id == id || context.name == *name) {
            return Err(malformed);
        }
        selected.push(SelectedContext { id, name: name.clone() });
        Ok(())
    }

    fn export_known(&mut self) -> Result<(), HandshakeError> {
        let mut export = std::mem::take(&mut self.info).finish()?;
        if !self.outcome.mode.is_structured() {
            export.flags = export.flags.without(TransmissionFlags::SEND_DF);
        }
        self.outcome.export = Some(export);
        Ok(())
    }

    fn export_name_reply(&mut self, input: &mut BytesMut) -> Result<bool, HandshakeError> {
        let padding = if self.no_zeroes { 0 } else { EXPORT_NAME_PADDING };
        if input.len() < 10 + padding {
            return Ok(false);
        }
        let (size, flags) = (input.get_u64(), TransmissionFlags(input.get_u16()));
        input.advance(padding);
        self.info = InfoCollector::of_export_name(size, flags);
        self.export_known()?;
        self.next_step();
        Ok(true)
    }
}

fn listed_export(data: &[u8]) -> Result<ListedExport, HandshakeError> {
    let malformed = HandshakeError::Malformed("SERVER reply");
    let mut reader = Reader::new(data);
    let name = reader.bytes_u32().ok_or(malformed)?;
    Ok(ListedExport {
        name: string(name, "export name")?,
        description: option_reply::message(reader.rest()),
    })
}
