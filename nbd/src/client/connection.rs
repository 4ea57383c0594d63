use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, Operation, Result,
    WriteFlags, ZeroFlags,
};
use bytes::Bytes;

use super::connect::{self, Negotiated};
use super::driver::{Driver, DriverOptions, disconnect};
use super::operation::{Call, CallSpec, FromCall, Payload};
use super::queue::{Queue, Submitted};
use super::status::{DATA, statuses};
use super::{ClientError, ConnectOptions};
use crate::proto::client::{ExportInfo, Extent, HandshakeError, SelectedContext, Transmission};
use crate::proto::wire::{
    BASE_ALLOCATION, Command, CommandFlags, PAYLOAD_LEN_MAX, TransmissionFlags, TransmissionMode,
};
use crate::tls::TlsPeer;

/// One connection to one export: a device with many requests in flight.
///
/// * An operation takes its place on the wire when it is called, not when its [`Io`] is polled:
///   the order of the calls is the order on the wire, also for those that wait because the limit
///   on requests in flight is reached.
/// * Dropping an [`Io`] does not take the operation back.
/// * When the connection is lost, when the server breaks the protocol, or when any request is not
///   answered in time, the connection has ended: everything pending fails with
///   [`ErrorKind::NotConnected`] (or [`ErrorKind::TimedOut`]), everything later at once. What had
///   been sent may or may not have been carried out.
/// * What the server can't do is made up for: `FUA` becomes a write and a flush, zeroes are
///   written, discards are left out, a flush of a server without a cache succeeds. Only there is
///   an [`Io`] needed to the end: the flush that stands in for `FUA` is sent when it is polled
///   after the write.
/// * A failed request whose [`Io`] was dropped is logged; a flush that failed makes every later
///   one fail, whether somebody waited for it or not.
///
/// A flush at [`FlushLevel::Process`] sends nothing: what the server has acknowledged does not
/// depend on this process.
#[derive(Debug)]
pub struct Connection {
    queue: Arc<Queue>,
    export: ExportInfo,
    limits: Limits,
    /// Longest payload of one request, in bytes: a multiple of the block.
    payload_len_max: u32,
    mode: TransmissionMode,
    /// In bytes; other than what `export` says once it has been changed.
    size: Arc<AtomicU64>,
    contexts: Vec<SelectedContext>,
    /// Which of them is `base:allocation`.
    allocation: Option<usize>,
    private_replies: Vec<Bytes>,
    tls_peer: Option<Arc<TlsPeer>>,
}

impl Connection {
    /// Connects and opens the export. The task that drives the connection runs on the current
    /// tokio runtime.
    ///
    /// # Errors
    /// No connection, a refusal, a violation of the protocol, or no end of it within the timeout.
    pub async fn connect(options: &ConnectOptions) -> std::result::Result<Arc<Self>, ClientError> {
        let Negotiated { mut stream, mut outcome, rest } = connect::open(options).await?;
        let server = options.endpoint.to_string();
        let export = outcome.export.take().ok_or_else(|| ClientError::Handshake {
            server: server.clone(),
            source: HandshakeError::NoExportInfo,
        })?;
        if options.needs_multi_conn && !export.flags.contains(TransmissionFlags::CAN_MULTI_CONN) {
            match outcome.mode.is_extended() {
                true => stream.say_goodbye(&disconnect().encode_extended()),
                false => stream.say_goodbye(&disconnect().encode()),
            }
            let reason = "it does not allow several connections".to_owned();
            return Err(ClientError::Incompatible { server, reason });
        }
        let ids = outcome.selected.iter().map(|context| context.id).collect();
        let transmission = Transmission::new(outcome.mode, ids);
        let queue = Arc::new(Queue::new(
            options.name.clone(),
            options.queued_max,
            options.queued_bytes_max,
        ));
        let driver_options = DriverOptions {
            server,
            in_flight_max: options.in_flight_max,
            in_flight_bytes_max: options.in_flight_bytes_max,
            request_timeout: options.request_timeout,
        };
        let tls_peer = stream.tls_peer().cloned();
        tokio::spawn(Driver::new(Arc::clone(&queue), stream, rest, transmission, driver_options));
        Ok(Arc::new(Connection {
            queue,
            limits: limits(&export),
            payload_len_max: whole_blocks(export.block_sizes.max.min(PAYLOAD_LEN_MAX), &export),
            mode: outcome.mode,
            size: Arc::new(AtomicU64::new(export.size)),
            allocation: outcome.selected.iter().position(|c| c.name == BASE_ALLOCATION),
            contexts: outcome.selected,
            private_replies: outcome.private_replies,
            tls_peer,
            export,
        }))
    }

    /// What the server says of the export.
    #[must_use]
    pub fn export(&self) -> &ExportInfo {
        &self.export
    }

    /// How requests and replies are laid out.
    #[must_use]
    pub fn mode(&self) -> TransmissionMode {
        self.mode
    }

    /// The server tells where the export has holes and zeroes.
    #[must_use]
    pub fn has_block_status(&self) -> bool {
        self.allocation.is_some()
    }

    /// Those of the meta contexts that the options named that the server has.
    #[must_use]
    pub fn contexts(&self) -> &[SelectedContext] {
        &self.contexts
    }

    /// The answers to the private options, in their order; empty where the server only
    /// acknowledged.
    #[must_use]
    pub fn private_replies(&self) -> &[Bytes] {
        &self.private_replies
    }

    /// Whose certificate the server has shown; none in the clear.
    #[must_use]
    pub fn tls_peer(&self) -> Option<&Arc<TlsPeer>> {
        self.tls_peer.as_ref()
    }

    /// How long the oldest request without an answer has been waiting, in the queue or for the
    /// server; `None` if nothing is pending.
    #[must_use]
    pub fn oldest_request_age(&self) -> Option<Duration> {
        self.queue.oldest_age()
    }

    /// The server has failed to flush; every later flush of this connection fails.
    #[must_use]
    pub fn flush_has_failed(&self) -> bool {
        self.queue.flush_has_failed()
    }

    /// Why the connection has ended, if it has.
    #[must_use]
    pub fn failure(&self) -> Option<ClientError> {
        self.queue.end()
    }

    /// Waits for the end of the connection, and tells its reason. May be awaited by several, and
    /// outlives the connection.
    pub fn failed(&self) -> impl Future<Output = ClientError> + Send + use<> {
        let mut ended = self.queue.ended();
        async move {
            match ended.wait_for(Option::is_some).await.map(|reason| reason.clone()) {
                Ok(Some(reason)) => reason,
                // The queue has gone without an end: its driver never ran.
                Ok(None) | Err(_) => ClientError::NotConnected,
            }
        }
    }

    /// Ends the connection politely once everything pending is answered; new requests are
    /// refused from now on. [`failed`](Self::failed) tells when that is done. Dropping the
    /// connection does the same.
    pub fn close(&self) {
        self.queue.close();
    }

    /// As [`close`](Self::close), and waits until the server has been told, or the connection has
    /// ended otherwise.
    pub async fn disconnect(&self) {
        self.close();
        self.failed().await;
    }

    /// Ends the connection now: everything pending fails, and nothing more is sent.
    pub fn kill(&self) {
        self.queue.fail(&ClientError::Closed { server: self.queue.name.clone() });
    }

    fn has(&self, flag: TransmissionFlags) -> bool {
        self.export.flags.contains(flag)
    }

    fn submit<T: FromCall>(&self, spec: CallSpec) -> Result<Submitted<T>> {
        self.queue.submit(Call::new(spec))
    }

    fn error(&self, spec: &CallSpec, kind: ErrorKind, detail: impl Into<String>) -> Error {
        Error::new(spec.operation, kind, self.queue.name.as_str(), detail).at(spec.offset, spec.len)
    }

    fn check(&self, spec: &CallSpec) -> Result<()> {
        let &CallSpec { operation, offset, len, .. } = spec;
        let changes = !matches!(operation, Operation::Read | Operation::BlockStatus);
        if changes && self.limits.read_only {
            return Err(self.error(spec, ErrorKind::ReadOnly, "the export is read-only"));
        }
        if len == 0 {
            return Ok(());
        }
        let transfers = matches!(operation, Operation::Read | Operation::Write);
        if transfers && len > u64::from(self.limits.transfer_max) {
            let max = self.limits.transfer_max;
            let detail = format!("longer than the {max} bytes that one request may have");
            return Err(self.error(spec, ErrorKind::InvalidInput, detail));
        }
        (self as &dyn BlockDevice).check_range(operation, offset, len)?;
        let block = u64::from(self.limits.block_size);
        let end = offset + len;
        let aligned =
            offset.is_multiple_of(block) && (end.is_multiple_of(block) || end == self.size());
        if aligned {
            return Ok(());
        }
        let detail = format!("not aligned to the server's minimum block of {block} bytes");
        Err(self.error(spec, ErrorKind::InvalidInput, detail))
    }

    fn transfer(&self, operation: Operation, command: Command, offset: u64, len: u64) -> CallSpec {
        CallSpec {
            operation,
            command,
            flags: CommandFlags::NONE,
            offset,
            len,
            payload: Payload::None,
            piece_len_max: self.payload_len_max.into(),
        }
    }

    /// For commands that move no data: as long as a length can be.
    fn effect(&self, operation: Operation, command: Command, offset: u64, len: u64) -> CallSpec {
        let piece_len_max = self.effect_len_max();
        CallSpec { piece_len_max, ..self.transfer(operation, command, offset, len) }
    }

    /// What a length can be at most, in whole blocks.
    fn effect_len_max(&self) -> u64 {
        let max = if self.mode.is_extended() { u64::MAX } else { u32::MAX.into() };
        max - max % u64::from(self.limits.block_size.max(512))
    }

    /// Submits, and lets a flush follow if `fua` is wanted of a server that does not have it.
    fn submit_durably(&self, mut spec: CallSpec, fua: bool) -> Io<'static, ()> {
        let native = self.has(TransmissionFlags::SEND_FUA);
        spec.flags = spec.flags.with_if(fua && native, CommandFlags::FUA);
        let submitted = match self.submit(spec) {
            Ok(submitted) => submitted,
            Err(error) => return Io::err(error),
        };
        if !fua || native || !self.has(TransmissionFlags::SEND_FLUSH) {
            return Io::future(submitted);
        }
        let queue = Arc::clone(&self.queue);
        let flush = Call::new(self.flush_spec());
        Io::future(async move {
            submitted.await?;
            queue.submit::<()>(flush)?.await
        })
    }

    fn flush_spec(&self) -> CallSpec {
        self.effect(Operation::Flush, Command::FLUSH, 0, 0)
    }

    /// As [`BlockDevice::read`], with an operation that does not borrow the connection.
    pub fn start_read(&self, offset: u64, len: usize) -> Io<'static, Bytes> {
        let spec = self.transfer(Operation::Read, Command::READ, offset, len as u64);
        if let Err(error) = self.check(&spec) {
            return Io::err(error);
        }
        if len == 0 {
            return Io::ok(Bytes::new());
        }
        self.submit(spec).map_or_else(Io::err, Io::future)
    }

    /// As [`BlockDevice::write`], with an operation that does not borrow the connection.
    pub fn start_write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'static, ()> {
        let mut spec = self.transfer(Operation::Write, Command::WRITE, offset, data.len() as u64);
        if let Err(error) = self.check(&spec) {
            return Io::err(error);
        }
        if data.is_empty() {
            return Io::ok(());
        }
        spec.payload = Payload::Data(data);
        self.submit_durably(spec, flags.fua)
    }

    /// As [`BlockDevice::write_zeroes`], with an operation that does not borrow the connection.
    pub fn start_write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'static, ()> {
        let mut spec = self.effect(Operation::WriteZeroes, Command::WRITE_ZEROES, offset, len);
        if let Err(error) = self.check(&spec) {
            return Io::err(error);
        }
        if flags.fast && !self.limits.fast_zero {
            let detail = "the server does not say whether zeroing is fast";
            return Io::err(self.error(&spec, ErrorKind::Unsupported, detail));
        }
        if len == 0 {
            return Io::ok(());
        }
        if self.has(TransmissionFlags::SEND_WRITE_ZEROES) {
            spec.flags = spec
                .flags
                .with_if(!flags.may_unmap, CommandFlags::NO_HOLE)
                .with_if(flags.fast, CommandFlags::FAST_ZERO);
        } else {
            spec.command = Command::WRITE;
            spec.payload = Payload::Zeroes;
            spec.piece_len_max = self.payload_len_max.into();
        }
        self.submit_durably(spec, flags.fua)
    }

    /// As [`BlockDevice::discard`], with an operation that does not borrow the connection.
    pub fn start_discard(&self, offset: u64, len: u64) -> Io<'static, ()> {
        let spec = self.effect(Operation::Discard, Command::TRIM, offset, len);
        if let Err(error) = self.check(&spec) {
            return Io::err(error);
        }
        if len == 0 {
            return Io::ok(());
        }
        if !self.has(TransmissionFlags::SEND_TRIM) {
            return self.nothing_to_send(Operation::Discard);
        }
        self.submit(spec).map_or_else(Io::err, Io::future)
    }

    /// As [`BlockDevice::block_status`], with an operation that does not borrow the connection.
    pub fn start_block_status(&self, offset: u64, len: u64) -> Io<'static, BlockStatus> {
        let first = |found: Vec<BlockStatus>| found.into_iter().next();
        let data = BlockStatus { len, flags: DATA };
        let found = self.allocation_status(offset, len, CommandFlags::REQ_ONE);
        Io::future(async move { Ok(first(found.await?).unwrap_or(data)) })
    }

    /// As [`BlockDevice::extents`], with an operation that does not borrow the connection.
    pub fn start_extents(&self, offset: u64, len: u64) -> Io<'static, Vec<BlockStatus>> {
        self.allocation_status(offset, len, CommandFlags::NONE)
    }

    fn allocation_status(
        &self,
        offset: u64,
        len: u64,
        flags: CommandFlags,
    ) -> Io<'static, Vec<BlockStatus>> {
        let spec = match self.status_spec(offset, len, flags) {
            Ok(spec) => spec,
            Err(error) => return Io::err(error),
        };
        let Some(index) = self.allocation.filter(|_| len > 0) else {
            return Io::ok(vec![BlockStatus { len, flags: DATA }]);
        };
        let (asked, block) = (spec.len, u64::from(self.limits.block_size));
        match self.submit::<Vec<Vec<Extent>>>(spec) {
            Ok(submitted) => Io::future(async move {
                let found = submitted.await?;
                Ok(statuses(found.get(index).map_or(&[], Vec::as_slice), asked, block))
            }),
            Err(error) => Io::err(error),
        }
    }

    /// The state of the beginning of a range in each of the [`contexts`](Self::contexts), in their
    /// order: extents that follow each other, at least one, and together at most `len` bytes long.
    /// One context may reach further than another. `len` must not be 0.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if there is no context; else as for
    /// [`BlockDevice::block_status`].
    pub fn start_meta_status(&self, offset: u64, len: u64) -> Io<'static, Vec<Vec<Extent>>> {
        let spec = match self.status_spec(offset, len, CommandFlags::NONE) {
            Ok(spec) => spec,
            Err(error) => return Io::err(error),
        };
        let fail = |kind, detail| Io::err(self.error(&spec, kind, detail));
        if len == 0 {
            return fail(ErrorKind::InvalidInput, "an empty range has no state");
        }
        if self.contexts.is_empty() {
            return fail(ErrorKind::Unsupported, "the server does not have this meta context");
        }
        let asked = spec.len;
        match self.submit::<Vec<Vec<Extent>>>(spec) {
            Ok(submitted) => Io::future(async move {
                let mut found = submitted.await?;
                found.iter_mut().for_each(|extents| clip(extents, asked));
                Ok(found)
            }),
            Err(error) => Io::err(error),
        }
    }

    /// How far the answer reaches is up to the server, so what lies beyond the longest length is
    /// asked for next.
    fn status_spec(&self, offset: u64, len: u64, flags: CommandFlags) -> Result<CallSpec> {
        let asked = len.min(self.effect_len_max());
        let mut spec = self.effect(Operation::BlockStatus, Command::BLOCK_STATUS, offset, asked);
        spec.flags = flags;
        self.check(&CallSpec { len, ..spec_range(&spec) })?;
        Ok(spec)
    }

    /// As [`BlockDevice::flush`], with an operation that does not borrow the connection.
    pub fn start_flush(&self, level: FlushLevel) -> Io<'static, ()> {
        let needless = level == FlushLevel::Process || self.limits.read_only;
        if needless || !self.has(TransmissionFlags::SEND_FLUSH) {
            return self.nothing_to_send(Operation::Flush);
        }
        self.submit::<()>(self.flush_spec()).map_or_else(Io::err, Io::future)
    }

    /// As [`BlockDevice::truncate`], with an operation that does not borrow the connection. The
    /// connection goes by the new size once the operation has been polled to its end.
    pub fn start_truncate(&self, size: u64) -> Io<'static, ()> {
        let spec = self.effect(Operation::Truncate, Command::RESIZE, size, 0);
        let fail = |kind, detail: &str| Io::err(self.error(&spec, kind, detail));
        if self.limits.read_only {
            return fail(ErrorKind::ReadOnly, "the export is read-only");
        }
        if !self.has(TransmissionFlags::SEND_RESIZE) {
            return fail(ErrorKind::Unsupported, "the server does not let clients change the size");
        }
        if !size.is_multiple_of(self.limits.block_size.into()) || i64::try_from(size).is_err() {
            let detail = "no size that an export with its blocks can have";
            return fail(ErrorKind::InvalidInput, detail);
        }
        let current = Arc::clone(&self.size);
        match self.submit::<()>(spec) {
            Ok(submitted) => Io::future(async move {
                submitted.await?;
                current.store(size, Ordering::Relaxed);
                Ok(())
            }),
            Err(error) => Io::err(error),
        }
    }

    /// Succeeds, but not on a connection that has ended.
    fn nothing_to_send(&self, operation: Operation) -> Io<'static, ()> {
        match self.queue.end() {
            None if operation == Operation::Flush && self.queue.flush_has_failed() => {
                let detail = "an earlier flush has failed; what was lost is not known";
                Io::err(Error::new(operation, ErrorKind::Sticky, self.queue.name.as_str(), detail))
            }
            None => Io::ok(()),
            Some(reason) => Io::err(Error::new(
                operation,
                reason.kind(),
                self.queue.name.as_str(),
                reason.to_string(),
            )),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.queue.close();
    }
}

impl BlockDevice for Connection {
    fn name(&self) -> &str {
        &self.queue.name
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.start_read(offset, len)
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.start_write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.start_write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.start_discard(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.start_block_status(offset, len)
    }

    fn extents(&self, offset: u64, len: u64) -> Io<'_, Vec<BlockStatus>> {
        self.start_extents(offset, len)
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.start_flush(level)
    }

    fn truncate(&self, size: u64) -> Io<'_, ()> {
        self.start_truncate(size)
    }
}

fn spec_range(spec: &CallSpec) -> CallSpec {
    CallSpec { payload: Payload::None, ..*spec }
}

fn whole_blocks(len: u32, export: &ExportInfo) -> u32 {
    len - len % export.block_sizes.min
}

fn limits(export: &ExportInfo) -> Limits {
    let sizes = export.block_sizes;
    Limits {
        block_size: sizes.min,
        preferred_size: sizes.preferred.min(PAYLOAD_LEN_MAX),
        // A server that takes less at a time gets several requests.
        transfer_max: whole_blocks(PAYLOAD_LEN_MAX, export),
        read_only: export.flags.contains(TransmissionFlags::READ_ONLY),
        growable: false,
        can_discard: export.flags.contains(TransmissionFlags::SEND_TRIM),
        fast_zero: export
            .flags
            .contains(TransmissionFlags::SEND_WRITE_ZEROES.with(TransmissionFlags::SEND_FAST_ZERO)),
    }
}

/// Cuts extents to what was asked for.
fn clip(extents: &mut Vec<Extent>, asked: u64) {
    let mut rest = asked;
    extents.retain_mut(|extent| {
        extent.len = extent.len.min(rest);
        rest -= extent.len;
        extent.len > 0
    });
}
