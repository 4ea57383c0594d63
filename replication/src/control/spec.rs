use serde_json::{Map, Value};

use super::{CommandError, ErrorClass};

/// A command and the arguments that it takes.
#[derive(Debug, Clone, Copy)]
pub struct CommandSpec {
    /// The name on the wire.
    pub name: &'static str,
    /// Every argument that exists; all others are refused.
    pub arguments: &'static [ArgumentSpec],
}

/// One argument of a command.
#[derive(Debug, Clone, Copy)]
pub struct ArgumentSpec {
    /// The member of `arguments`.
    pub name: &'static str,
    /// What values it takes.
    pub kind: ArgumentKind,
    /// Whether the command is refused without it.
    pub required: bool,
}

/// What values an argument takes.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum ArgumentKind {
    /// Any string.
    String,
    /// `true` or `false`.
    Boolean,
    /// A whole number that fits 64 bits.
    Integer,
    /// One of these strings.
    Enum(&'static [&'static str]),
    /// A list of strings.
    Strings,
}

impl CommandSpec {
    /// A command with these arguments.
    pub const fn new(name: &'static str, arguments: &'static [ArgumentSpec]) -> Self {
        CommandSpec { name, arguments }
    }

    /// Checks arguments against the description, before anything has been done.
    pub(super) fn check(&self, arguments: &Map<String, Value>) -> Result<(), CommandError> {
        for argument in self.arguments {
            match arguments.get(argument.name) {
                Some(value) => argument.check(value)?,
                None if argument.required => {
                    return usage(format!("Parameter '{}' is missing", argument.name));
                }
                None => {}
            }
        }
        match arguments.keys().find(|key| self.arguments.iter().all(|a| a.name != key.as_str())) {
            Some(unknown) => usage(format!("Parameter '{unknown}' is unexpected")),
            None => Ok(()),
        }
    }
}

impl ArgumentSpec {
    /// An argument that may be left out.
    pub const fn optional(name: &'static str, kind: ArgumentKind) -> Self {
        ArgumentSpec { name, kind, required: false }
    }

    /// An argument without which the command is refused.
    pub const fn required(name: &'static str, kind: ArgumentKind) -> Self {
        ArgumentSpec { name, kind, required: true }
    }

    fn check(&self, value: &Value) -> Result<(), CommandError> {
        let (fits, expected) = match self.kind {
            ArgumentKind::String | ArgumentKind::Enum(_) => (value.is_string(), "string"),
            ArgumentKind::Boolean => (value.is_boolean(), "boolean"),
            ArgumentKind::Integer => (value.is_i64() || value.is_u64(), "integer"),
            ArgumentKind::Strings => {
                (value.as_array().is_some_and(|list| list.iter().all(Value::is_string)), "array")
            }
        };
        if !fits {
            let name = self.name;
            return usage(format!("Invalid parameter type for '{name}', expected: {expected}"));
        }
        if let (ArgumentKind::Enum(allowed), Some(text)) = (self.kind, value.as_str())
            && !allowed.contains(&text)
        {
            let name = self.name;
            return usage(format!("Parameter '{name}' does not accept value '{text}'"));
        }
        Ok(())
    }
}

fn usage(desc: String) -> Result<(), CommandError> {
    Err(CommandError::new(ErrorClass::GenericError, 2, desc))
}
