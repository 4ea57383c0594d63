use std::fmt;

use serde_json::{Value, json};

/// The class of a failed command, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorClass {
    /// Everything that has no class of its own.
    GenericError,
    /// There is no such command, or not in the current phase of the connection.
    CommandNotFound,
    /// The thing that was named is not active (a job that does not run).
    DeviceNotActive,
    /// The thing that was named does not exist.
    DeviceNotFound,
}

impl ErrorClass {
    /// Every class.
    pub const ALL: [ErrorClass; 4] = [
        ErrorClass::GenericError,
        ErrorClass::CommandNotFound,
        ErrorClass::DeviceNotActive,
        ErrorClass::DeviceNotFound,
    ];

    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorClass::GenericError => "GenericError",
            ErrorClass::CommandNotFound => "CommandNotFound",
            ErrorClass::DeviceNotActive => "DeviceNotActive",
            ErrorClass::DeviceNotFound => "DeviceNotFound",
        }
    }

    /// The class with this name; unknown ones are generic.
    pub(crate) fn from_wire(name: &str) -> Self {
        let known = Self::ALL.into_iter().find(|class| class.as_str() == name);
        known.unwrap_or(ErrorClass::GenericError)
    }
}

/// Why a command failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandError {
    /// For programs.
    pub class: ErrorClass,
    /// For people; not meant to be parsed.
    pub desc: String,
    /// The exit code of a program that ends because of this error: 1 failed, 2 usage, 3 refused
    /// because of state.
    pub exit_code: u8,
}

impl CommandError {
    /// An operation that failed (exit code 1).
    pub fn failed(desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, 1, desc)
    }

    /// Arguments that make no sense (exit code 2).
    pub fn usage(desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, 2, desc)
    }

    /// An operation that the current state forbids (exit code 3).
    pub fn refused(desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, 3, desc)
    }

    /// A failure with everything given.
    pub fn new(class: ErrorClass, exit_code: u8, desc: impl Into<String>) -> Self {
        CommandError { class, desc: desc.into(), exit_code }
    }

    pub(crate) fn to_value(&self) -> Value {
        json!({ "class": self.class.as_str(), "desc": self.desc, "exit-code": self.exit_code })
    }

    pub(crate) fn from_value(value: &Value) -> Self {
        let text = |key| value.get(key).and_then(Value::as_str).unwrap_or_default();
        let code = value.get("exit-code").and_then(Value::as_u64).unwrap_or(1);
        CommandError {
            class: ErrorClass::from_wire(text("class")),
            desc: text("desc").to_owned(),
            exit_code: u8::try_from(code).ok().filter(|code| (1..=3).contains(code)).unwrap_or(1),
        }
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for CommandError {}
