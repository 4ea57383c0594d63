//! Cuts a byte stream into messages, without understanding them.
//!
//! A message may span lines, and several may stand on one line. What confuses this (a control
//! character in the middle of a message, a message that is too long) costs the message and is
//! reported, and the stream goes on.

use bytes::{Buf, BytesMut};

/// What the stream holds next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// The bytes of one message, from its first to its last.
    Message(BytesMut),
    /// A message was broken off by a control character, and is forgotten.
    Reset,
    /// A message was longer than allowed; it is skipped up to the end of the line.
    TooLong,
}

/// Holds what has arrived and not been cut off yet.
#[derive(Debug)]
pub(super) struct Framer {
    input: BytesMut,
    /// How far `input` has been looked at.
    scanned: usize,
    /// Brackets that are open.
    depth: usize,
    /// The quote that ends the string that is open.
    quote: Option<u8>,
    /// The last byte of the string was a backslash.
    escaped: bool,
    /// The rest of a line whose message was too long is passed over.
    skipping: bool,
    message_bytes_max: usize,
}

impl Framer {
    pub(super) fn new(message_bytes_max: usize) -> Self {
        Framer {
            input: BytesMut::with_capacity(1024),
            scanned: 0,
            depth: 0,
            quote: None,
            escaped: false,
            skipping: false,
            message_bytes_max,
        }
    }

    /// Where what arrives is appended.
    pub(super) fn input(&mut self) -> &mut BytesMut {
        &mut self.input
    }

    /// The next message, or none until more has arrived.
    pub(super) fn next(&mut self) -> Option<Frame> {
        while let Some(&byte) = self.input.get(self.scanned) {
            if self.skipping {
                let end = self.input.iter().position(|&byte| byte < 0x20 && byte != b'\t');
                self.skipping = end.is_none();
                self.forget(end.map_or(self.input.len(), |end| end + 1));
            } else if self.scanned > self.message_bytes_max {
                self.skipping = true;
                self.forget(self.scanned);
                return Some(Frame::TooLong);
            } else if let Some(frame) = self.step(byte) {
                return Some(frame);
            }
        }
        None
    }

    /// Takes one byte into account.
    fn step(&mut self, byte: u8) -> Option<Frame> {
        if let Some(quote) = self.quote {
            return self.step_in_string(byte, quote);
        }
        let inside = self.depth > 0;
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' if inside => self.scanned += 1,
            b' ' | b'\t' | b'\r' | b'\n' => return self.end_scalar(1),
            0..0x20 => return self.reset(),
            b'"' | b'\'' | b'{' | b'[' if !inside && self.scanned > 0 => return self.end_scalar(0),
            b'"' | b'\'' => {
                self.quote = Some(byte);
                self.scanned += 1;
            }
            b'{' | b'[' => {
                self.depth += 1;
                self.scanned += 1;
            }
            b'}' | b']' => {
                // One too many makes a message of its own, which the parser refuses.
                self.depth = self.depth.saturating_sub(1);
                self.scanned += 1;
                return (self.depth == 0).then(|| self.cut());
            }
            _ => self.scanned += 1,
        }
        None
    }

    fn step_in_string(&mut self, byte: u8, quote: u8) -> Option<Frame> {
        if byte < 0x20 {
            // JSON has no such thing in a string: a client that lost track, or a reset.
            return self.reset();
        }
        self.scanned += 1;
        if std::mem::take(&mut self.escaped) {
            return None;
        }
        match byte {
            b'\\' => self.escaped = true,
            _ if byte == quote => {
                self.quote = None;
                return (self.depth == 0).then(|| self.cut());
            }
            _ => {}
        }
        None
    }

    /// Between messages: what has come before this byte is a message, if it is anything.
    fn end_scalar(&mut self, passed_over: usize) -> Option<Frame> {
        let frame = (self.scanned > 0).then(|| self.cut());
        self.forget(passed_over);
        frame
    }

    fn cut(&mut self) -> Frame {
        let message = self.input.split_to(self.scanned);
        self.scanned = 0;
        Frame::Message(message)
    }

    /// Forgets the message that has begun, and the byte that confuses it.
    fn reset(&mut self) -> Option<Frame> {
        let begun = self.scanned > 0;
        self.forget(self.scanned + 1);
        begun.then_some(Frame::Reset)
    }

    fn forget(&mut self, count: usize) {
        self.input.advance(count.min(self.input.len()));
        (self.scanned, self.depth, self.quote, self.escaped) = (0, 0, None, false);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames(input: &[u8], max: usize) -> Vec<Frame> {
        let mut framer = Framer::new(max);
        framer.input().extend_from_slice(input);
        std::iter::from_fn(|| framer.next()).collect()
    }

    fn message(text: &str) -> Frame {
        Frame::Message(text.as_bytes().into())
    }

    #[test]
    fn messages_need_no_lines_and_may_span_some() {
        let found = frames(b" {\"a\":\n [1, 2]}{'b':\"}\\\"\"}[]12 \"x\"nonsense\r\n}{", 100);
        let expected =
            ["{\"a\":\n [1, 2]}", "{'b':\"}\\\"\"}", "[]", "12", "\"x\"", "nonsense", "}"];
        assert_eq!(found, expected.map(message));
    }

    #[test]
    fn a_control_character_ends_what_was_begun() {
        assert_eq!(frames(b"{\"a\":\x01{}", 100), [Frame::Reset, message("{}")]);
        assert_eq!(frames(b"{\"a\n{}", 100), [Frame::Reset, message("{}")]);
        assert_eq!(frames(b"\x01\x1f{}", 100), [message("{}")]);
    }

    #[test]
    fn what_is_too_long_is_skipped_up_to_the_end_of_the_line() {
        assert_eq!(frames(b"[1,2,3,4,5]]]\n{}", 6), [Frame::TooLong, message("{}")]);
    }

    proptest! {
        #[test]
        fn the_cuts_do_not_depend_on_how_the_bytes_arrive(
            input in proptest::collection::vec(
                prop_oneof![proptest::sample::select(b"{}[]\"'\\ \n\x01a1".to_vec()), any::<u8>()],
                0..200,
            ),
            chunk in 1usize..9,
        ) {
            let mut framer = Framer::new(20);
            let mut found = Vec::new();
            for part in input.chunks(chunk) {
                framer.input().extend_from_slice(part);
                found.extend(std::iter::from_fn(|| framer.next()));
                prop_assert!(framer.input().len() <= 21 + 1, "what is kept is bounded");
            }
            prop_assert_eq!(found, frames(&input, 20));
        }
    }
}
