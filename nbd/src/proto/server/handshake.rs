//! A server's handshake: fixed newstyle, options 1 to 11 (§2, §7, §8).

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::agreement::{Agreed, ExportDescription, ExportInfo, SelectedContext};
use super::contexts::{MetaOption, Selection, parse_meta};
use super::options::{
    InfoOption, InfoRequests, OptionError, OptionErrorCode, parse_info, refused_unread, string,
    unsupported, without_data,
};
use crate::proto::wire::{
    ClientFlags, EXPORT_NAME_PADDING, HandshakeFlags, INIT_MAGIC, InfoType, OPTION_LEN_MAX,
    OPTION_MAGIC, OptionCode, OptionHeader, OptionReplyHeader, PAYLOAD_LEN_MAX, PRIVATE_REPLY,
    ReplyType, STRING_LEN_MAX, TransmissionFlags, TransmissionMode,
};

/// Most options that one handshake may consist of. Clients send less than ten; one that lists a
/// large server's exports one by one stays below this.
const OPTIONS_MAX: u32 = 1024;

/// A minimum block size up to this many bytes is obeyed by clients that never asked for it.
const UNASKED_BLOCK_SIZE_MAX: u32 = 512;

/// Why a connection ends during its handshake.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Ending {
    /// The client asked for it.
    #[error("the client ended the handshake")]
    Aborted,
    /// What came cannot be answered.
    #[error("{0}")]
    Violation(&'static str),
    /// `EXPORT_NAME` cannot be refused in any other way.
    #[error("{0}")]
    Refused(OptionError),
}

/// What a server does about TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsPolicy {
    /// It has none.
    #[default]
    Off,
    /// A client may begin it, and has to before private options.
    Optional,
    /// A client has to begin it before anything else.
    Required,
}

/// What a handshake needs next.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// At least this many more bytes of input.
    Input(usize),
    /// The output sent, then TLS, then [`Handshake::tls_started`]; no more input before that.
    StartTls,
    /// [`Handshake::listed`].
    List,
    /// [`Handshake::opened`].
    Open(String),
    /// [`Handshake::answered`].
    Private {
        /// The number of the option.
        option: u32,
        /// Its data.
        data: Bytes,
    },
    /// Nothing: the transmission phase begins with what is left of the input.
    Transmission(Box<Agreed>),
    /// Nothing: the connection is to be closed once the output is sent.
    Close(Ending),
}

#[derive(Debug)]
enum Phase {
    ClientFlags,
    Header,
    Data(OptionHeader),
    /// `left` bytes are dropped, then the option is refused.
    Skip {
        option: OptionCode,
        left: usize,
        refusal: OptionError,
    },
    StartTls,
    Asked(Question),
    Transmission(Box<Agreed>),
    Closed(Ending),
}

/// What the driver has been asked, and what for.
#[derive(Debug, Clone)]
enum Question {
    List,
    ExportName(String),
    Info(OptionCode, InfoOption),
    Meta(OptionCode, MetaOption),
    Private(OptionCode, Bytes),
}

impl Question {
    fn step(&self) -> Step {
        match self {
            Question::List => Step::List,
            Question::ExportName(name) => Step::Open(name.clone()),
            Question::Info(_, info) => Step::Open(info.export.clone()),
            Question::Meta(_, meta) => Step::Open(meta.export.clone()),
            Question::Private(option, data) => {
                Step::Private { option: option.0, data: data.clone() }
            }
        }
    }
}

/// The state machine of one handshake.
///
/// Call [`step`](Self::step) with all input that there is, do what it asks for, and again; send
/// what [`take_output`](Self::take_output) gives before waiting for input.
#[derive(Debug)]
pub struct Handshake {
    phase: Phase,
    output: BytesMut,
    fixed_newstyle: bool,
    no_zeroes: bool,
    mode: TransmissionMode,
    selection: Option<Selection>,
    options_left: u32,
    shutting_down: bool,
    tls: TlsPolicy,
    /// TLS is in use.
    secured: bool,
}

impl Default for Handshake {
    fn default() -> Self {
        Self::new()
    }
}

impl Handshake {
    /// A connection has been made; the greeting is in the output.
    #[must_use]
    pub fn new() -> Self {
        let mut output = BytesMut::with_capacity(256);
        output.put_u64(INIT_MAGIC);
        output.put_u64(OPTION_MAGIC);
        output.put_u16(HandshakeFlags::FIXED_NEWSTYLE.with(HandshakeFlags::NO_ZEROES).0);
        Handshake {
            phase: Phase::ClientFlags,
            output,
            fixed_newstyle: false,
            no_zeroes: false,
            mode: TransmissionMode::Simple,
            selection: None,
            options_left: OPTIONS_MAX,
            shutting_down: false,
            tls: TlsPolicy::Off,
            secured: false,
        }
    }

    /// What to do about TLS.
    #[must_use]
    pub fn with_tls(mut self, tls: TlsPolicy) -> Self {
        self.tls = tls;
        self
    }

    /// What has to be sent, in order; empties the output.
    pub fn take_output(&mut self) -> Bytes {
        self.output.split().freeze()
    }

    /// From now on every option but `ABORT` is refused with `ERR_SHUTDOWN`.
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
    }

    /// Goes on as far as the input reaches. A question is repeated until it is answered.
    pub fn step(&mut self, input: &mut BytesMut) -> Step {
        loop {
            let missing = match &mut self.phase {
                Phase::ClientFlags => self.client_flags(input),
                Phase::Header => self.header(input),
                Phase::Data(header) => {
                    let header = *header;
                    self.data(header, input)
                }
                Phase::Skip { left, .. } => {
                    let count = input.len().min(*left);
                    input.advance(count);
                    *left -= count;
                    if *left > 0 { Some(*left) } else { self.skipped() }
                }
                Phase::StartTls => return Step::StartTls,
                Phase::Asked(question) => return question.step(),
                Phase::Transmission(agreed) => return Step::Transmission(agreed.clone()),
                Phase::Closed(ending) => return Step::Close(ending.clone()),
            };
            if let Some(missing) = missing {
                return Step::Input(missing);
            }
        }
    }

    /// TLS is in use from now on: answers [`Step::StartTls`]. Nothing that was agreed on in the
    /// clear counts any more.
    pub fn tls_started(&mut self) {
        if !matches!(self.phase, Phase::StartTls) {
            return;
        }
        self.phase = Phase::Header;
        self.secured = true;
        self.mode = TransmissionMode::Simple;
        self.selection = None;
    }

    /// The exports there are: answers [`Step::List`].
    pub fn listed(&mut self, exports: &[ExportDescription]) {
        let Phase::Asked(Question::List) = self.phase else { return };
        for export in exports {
            let name = truncated(&export.name).as_bytes();
            let description = truncated(&export.description).as_bytes();
            let mut data = BytesMut::with_capacity(4 + name.len() + description.len());
            data.put_u32(len_u32(name));
            data.put_slice(name);
            data.put_slice(description);
            self.reply(OptionCode::LIST, ReplyType::SERVER, &data);
        }
        self.ack(OptionCode::LIST);
        self.phase = Phase::Header;
    }

    /// The export that was asked for: answers [`Step::Open`].
    pub fn opened(&mut self, export: Result<ExportInfo, OptionError>) {
        let phase = std::mem::replace(&mut self.phase, Phase::Header);
        let Phase::Asked(question) = phase else {
            self.phase = phase;
            return;
        };
        match (question, export) {
            (Question::ExportName(_), Ok(export)) => self.export_name_accepted(export),
            (Question::ExportName(_), Err(error)) => {
                self.phase = Phase::Closed(Ending::Refused(error));
            }
            (Question::Info(option, info), Ok(export)) => self.info(option, info.requests, export),
            (Question::Meta(option, meta), Ok(export)) => self.meta(option, &meta, &export),
            (Question::Info(option, _) | Question::Meta(option, _), Err(error)) => {
                self.refuse(option, &error);
            }
            (question @ (Question::List | Question::Private(..)), _) => {
                self.phase = Phase::Asked(question);
            }
        }
    }

    /// The answer to a private option: its data (sent if there are any), then `ACK`; or a
    /// refusal. Answers [`Step::Private`].
    pub fn answered(&mut self, answer: Result<Bytes, OptionError>) {
        let Phase::Asked(Question::Private(option, _)) = self.phase else { return };
        self.phase = Phase::Header;
        match answer {
            Ok(data) => {
                if !data.is_empty() {
                    self.reply(option, PRIVATE_REPLY, &data);
                }
                self.ack(option);
            }
            Err(error) => self.refuse(option, &error),
        }
    }

    fn client_flags(&mut self, input: &mut BytesMut) -> Option<usize> {
        if input.len() < 4 {
            return Some(4 - input.len());
        }
        let flags = ClientFlags(input.get_u32());
        self.fixed_newstyle = flags.contains(ClientFlags::FIXED_NEWSTYLE);
        self.no_zeroes = flags.contains(ClientFlags::NO_ZEROES);
        let known = ClientFlags::FIXED_NEWSTYLE.with(ClientFlags::NO_ZEROES);
        if flags.without(known).is_empty() {
            self.phase = Phase::Header;
        } else {
            self.violation("the client set handshake flags that were not offered");
        }
        None
    }

    fn header(&mut self, input: &mut BytesMut) -> Option<usize> {
        let Some(bytes) = input.first_chunk() else {
            return Some(OptionHeader::SIZE - input.len());
        };
        let header = OptionHeader::decode(bytes);
        input.advance(OptionHeader::SIZE);
        let Ok(header) = header else {
            self.violation("an option has the wrong magic number");
            return None;
        };
        if header.len > OPTION_LEN_MAX {
            self.violation("an option is longer than 32 MiB");
        } else if self.options_left == 0 {
            self.violation("too many options");
        } else if header.option == OptionCode::EXPORT_NAME && header.len as usize > STRING_LEN_MAX {
            self.violation("an export name is longer than 4096 bytes");
        } else if header.option != OptionCode::EXPORT_NAME && !self.fixed_newstyle {
            self.violation("an option that only fixed newstyle clients may send");
        } else if self.wants_tls_before(header.option) {
            if header.option == OptionCode::EXPORT_NAME {
                self.violation("the client has to begin TLS first");
            } else {
                let refusal = OptionError::new(OptionErrorCode::TlsRequired, "begin TLS first");
                let left = header.len as usize;
                self.phase = Phase::Skip { option: header.option, left, refusal };
            }
        } else if let Some(refusal) = refused_unread(header) {
            if header.option == OptionCode::SET_META_CONTEXT {
                self.selection = None;
            }
            let left = header.len as usize;
            self.phase = Phase::Skip { option: header.option, left, refusal };
        } else {
            self.phase = Phase::Data(header);
        }
        self.options_left = self.options_left.saturating_sub(1);
        None
    }

    fn wants_tls_before(&self, option: OptionCode) -> bool {
        match self.tls {
            _ if self.secured => false,
            TlsPolicy::Off => false,
            TlsPolicy::Optional => option.is_private(),
            TlsPolicy::Required => !matches!(option, OptionCode::STARTTLS | OptionCode::ABORT),
        }
    }

    fn skipped(&mut self) -> Option<usize> {
        if let Phase::Skip { option, refusal, .. } =
            std::mem::replace(&mut self.phase, Phase::Header)
        {
            if option == OptionCode::ABORT {
                self.ack(option);
                self.phase = Phase::Closed(Ending::Aborted);
            } else {
                self.refuse(option, &refusal);
            }
        }
        None
    }

    fn data(&mut self, header: OptionHeader, input: &mut BytesMut) -> Option<usize> {
        let len = header.len as usize;
        if input.len() < len {
            return Some(len - input.len());
        }
        let data = input.split_to(len).freeze();
        self.phase = Phase::Header;
        if let Err(error) = self.option(header.option, data) {
            self.refuse(header.option, &error);
        }
        if matches!(self.phase, Phase::StartTls) && !input.is_empty() {
            // It waits for our answer, if it is the client; so somebody else has sent this.
            self.violation("something came in the clear after STARTTLS");
        }
        None
    }

    fn option(&mut self, option: OptionCode, data: Bytes) -> Result<(), OptionError> {
        if option == OptionCode::ABORT {
            self.ack(option);
            self.phase = Phase::Closed(Ending::Aborted);
            return Ok(());
        }
        if self.shutting_down {
            if option == OptionCode::EXPORT_NAME {
                self.violation("the server is shutting down");
                return Ok(());
            }
            return Err(OptionError::new(OptionErrorCode::Shutdown, "the server is shutting down"));
        }
        let question = match option {
            OptionCode::EXPORT_NAME if self.mode.is_extended() => {
                self.violation("EXPORT_NAME cannot be used with extended headers");
                return Ok(());
            }
            OptionCode::EXPORT_NAME => match string(&data) {
                Ok(name) => Question::ExportName(name),
                Err(error) => {
                    self.phase = Phase::Closed(Ending::Refused(error));
                    return Ok(());
                }
            },
            OptionCode::LIST => {
                without_data(&data)?;
                Question::List
            }
            OptionCode::STRUCTURED_REPLY | OptionCode::EXTENDED_HEADERS => {
                return self.change_mode(option, &data);
            }
            OptionCode::INFO | OptionCode::GO => Question::Info(option, parse_info(&data)?),
            OptionCode::LIST_META_CONTEXT => Question::Meta(option, parse_meta(&data)?),
            OptionCode::SET_META_CONTEXT => {
                // A selection that fails leaves none behind.
                self.selection = None;
                if !self.mode.is_structured() {
                    return Err(OptionError::invalid("structured replies come first"));
                }
                Question::Meta(option, parse_meta(&data)?)
            }
            _ if option.is_private() => Question::Private(option, data),
            OptionCode::STARTTLS => return self.start_tls(&data),
            _ => return Err(unsupported("unknown option")),
        };
        self.phase = Phase::Asked(question);
        Ok(())
    }

    fn start_tls(&mut self, data: &[u8]) -> Result<(), OptionError> {
        without_data(data)?;
        if self.tls == TlsPolicy::Off {
            return Err(unsupported("TLS is not configured"));
        }
        if self.secured {
            return Err(OptionError::invalid("TLS is in use already"));
        }
        self.ack(OptionCode::STARTTLS);
        self.phase = Phase::StartTls;
        Ok(())
    }

    fn change_mode(&mut self, option: OptionCode, data: &[u8]) -> Result<(), OptionError> {
        without_data(data)?;
        let wanted = match option {
            OptionCode::EXTENDED_HEADERS => TransmissionMode::Extended,
            _ => TransmissionMode::Structured,
        };
        if wanted == self.mode {
            return Err(OptionError::invalid("that is agreed on already"));
        }
        if wanted < self.mode {
            let text = "extended headers, which are agreed on, come with replies of their own";
            return Err(OptionError::new(OptionErrorCode::ExtendedHeadersRequired, text));
        }
        self.mode = wanted;
        self.ack(option);
        Ok(())
    }

    fn export_name_accepted(&mut self, export: ExportInfo) {
        self.output.put_u64(export.size);
        self.output.put_u16(self.transmission_flags(&export).0);
        if !self.no_zeroes {
            self.output.put_bytes(0, EXPORT_NAME_PADDING);
        }
        self.agree(export, false);
    }

    fn info(&mut self, option: OptionCode, requests: InfoRequests, export: ExportInfo) {
        if export.block_size > UNASKED_BLOCK_SIZE_MAX && !requests.block_size {
            let message = format!("requests have to be multiples of {} bytes", export.block_size);
            let error = OptionError::new(OptionErrorCode::BlockSizeRequired, message);
            return self.refuse(option, &error);
        }
        let mut data = BytesMut::with_capacity(64);
        data.put_u16(InfoType::EXPORT.0);
        data.put_u64(export.size);
        data.put_u16(self.transmission_flags(&export).0);
        self.reply(option, ReplyType::INFO, &data);
        // Useful even to those who did not ask: they may obey it.
        data.clear();
        data.put_u16(InfoType::BLOCK_SIZE.0);
        data.put_u32(export.block_size);
        data.put_u32(export.preferred_size);
        data.put_u32(PAYLOAD_LEN_MAX);
        self.reply(option, ReplyType::INFO, &data);
        if requests.name {
            self.info_text(option, InfoType::NAME, &export.canonical_name);
        }
        if requests.description {
            self.info_text(option, InfoType::DESCRIPTION, &export.description);
        }
        self.ack(option);
        if option == OptionCode::GO {
            self.agree(export, requests.block_size);
        }
    }

    fn info_text(&mut self, option: OptionCode, kind: InfoType, text: &str) {
        let text = truncated(text);
        let mut data = BytesMut::with_capacity(2 + text.len());
        data.put_u16(kind.0);
        data.put_slice(text.as_bytes());
        self.reply(option, ReplyType::INFO, &data);
    }

    fn transmission_flags(&self, export: &ExportInfo) -> TransmissionFlags {
        export.transmission_flags(self.mode, !self.contexts(export).is_empty())
    }

    /// What is selected for this export.
    fn contexts(&self, export: &ExportInfo) -> &[SelectedContext] {
        self.selection.as_ref().map_or(&[], |selection| selection.for_export(export))
    }

    fn meta(&mut self, option: OptionCode, meta: &MetaOption, export: &ExportInfo) {
        if option == OptionCode::SET_META_CONTEXT {
            let selection = meta.selected(export);
            for context in selection.contexts() {
                self.meta_context(option, context.id, &context.name);
            }
            self.selection = Some(selection);
        } else {
            for context in meta.listed(export) {
                self.meta_context(option, 0, &context.name);
            }
        }
        self.ack(option);
    }

    fn meta_context(&mut self, option: OptionCode, id: u32, name: &str) {
        let mut data = BytesMut::with_capacity(4 + name.len());
        data.put_u32(id);
        data.put_slice(name.as_bytes());
        self.reply(option, ReplyType::META_CONTEXT, &data);
    }

    fn agree(&mut self, export: ExportInfo, block_size_agreed: bool) {
        self.phase = Phase::Transmission(Box::new(Agreed {
            mode: self.mode,
            contexts: self.contexts(&export).to_vec(),
            block_size_agreed,
            export,
        }));
    }

    fn violation(&mut self, what: &'static str) {
        self.phase = Phase::Closed(Ending::Violation(what));
    }

    fn ack(&mut self, option: OptionCode) {
        self.reply(option, ReplyType::ACK, &[]);
    }

    fn refuse(&mut self, option: OptionCode, error: &OptionError) {
        self.reply(option, error.code.reply_type(), truncated(&error.message).as_bytes());
    }

    fn reply(&mut self, option: OptionCode, kind: ReplyType, data: &[u8]) {
        let header = OptionReplyHeader { option, kind, len: len_u32(data) };
        self.output.put_slice(&header.encode());
        self.output.put_slice(data);
    }
}

/// The first 4096 bytes of a text, cut between characters: our own strings obey the limit, too.
pub(super) fn truncated(text: &str) -> &str {
    &text[..text.floor_char_boundary(STRING_LEN_MAX)]
}

/// The length of something that is bounded well below 4 GiB.
fn len_u32(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("texts and private answers are far shorter than 4 GiB")
}
