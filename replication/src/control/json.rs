//! JSON as it travels on the control socket: ASCII, one message per line.
use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{CompactFormatter, Formatter};

/// A message as it is sent: ASCII only, ended by CR LF.
pub(super) fn to_line(message: &Value) -> Vec<u8> {
    let mut line = Vec::with_capacity(128);
    let mut serializer = serde_json::Serializer::with_formatter(&mut line, Ascii(CompactFormatter));
    message
        .serialize(&mut serializer)
        .expect("a `Value` has string keys only, and a vector takes every write");
    line.extend_from_slice(b"\r\n");
    line
}

struct Ascii(CompactFormatter);

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut units = [0; 2];
        for character in fragment.chars() {
            if character.is_ascii() && character != '\x7f' {
                self.0.write_string_fragment(writer, character.encode_utf8(&mut [0; 4]))?;
            } else {
                for unit in character.encode_utf16(&mut units) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}

/// Turns strings in single quotes, which QMP accepts, into JSON strings.
pub(super) fn to_double_quotes(text: &str) -> String {
    let mut output = String::with_capacity(text.len());
    let mut quote = None;
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match (quote, character) {
            (None, '\'' | '"') => {
                quote = Some(character);
                output.push('"');
            }
            (Some(open), close) if open == close => {
                quote = None;
                output.push('"');
            }
            (Some('\''), '"') => output.push_str("\\\""),
            (Some(_), '\\') => match characters.next() {
                Some('\'') => output.push('\''),
                Some(escaped) => output.extend(['\\', escaped]),
                None => output.push('\\'),
            },
            _ => output.push(character),
        }
    }
    output
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn non_ascii_is_escaped_and_survives() {
        let message = Value::from("a\"ü\u{1f600}\u{7f}\n");
        let line = to_line(&message);
        assert!(line.is_ascii());
        assert!(line.ends_with(b"\r\n"));
        assert_eq!(serde_json::from_slice::<Value>(&line).unwrap(), message);
    }

    #[test]
    fn single_quotes_become_double_quotes() {
        assert_eq!(
            to_double_quotes(r#"{'a': 'say "x"', "b": "it's", 'c': 'it\'s'}"#),
            r#"{"a": "say \"x\"", "b": "it's", "c": "it's"}"#
        );
    }

    proptest! {
        #[test]
        fn quotes_in_strings_are_left_alone(texts in proptest::collection::vec(any::<String>(), 0..4)) {
            let message = Value::from(texts);
            let read = serde_json::from_str::<Value>(&to_double_quotes(&message.to_string()));
            prop_assert_eq!(read.unwrap(), message);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "[\\PC\"'\\\\{}:\\[\\],]{0,64}") {
            let text = to_double_quotes(&text);
            for message in serde_json::Deserializer::from_str(&text).into_iter::<Value>() {
                let Ok(message) = message else { break };
                let _ = crate::control::request::Request::parse(message, true);
            }
        }
    }
}
