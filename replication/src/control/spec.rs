use serde_json::{Map, Value};

use super::{CommandError, ErrorClass};

/// A command and the arguments that it takes.
#[derive(Debug, Clone, Copy)]
pub struct CommandSpec {
    /// The name on the wire.
    pub name: &'static str,
    /// Every argument that exists; all others are refused.
    pub arguments: &'static [ArgumentSpec],
    /// What it returns, in the words of the schema: a type, or `{}` for nothing.
    pub returns: &'static str,
    /// It may be executed out of band: it never waits.
    pub out_of_band: bool,
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
    /// Any number.
    Number,
    /// One of these strings.
    Enum(&'static [&'static str]),
    /// A list of strings.
    Strings,
    /// An object with these members.
    Object(&'static [ArgumentSpec]),
    /// An object whose member `type` is one of these, and whose member `data` is an object with
    /// that type's members.
    Union(&'static [Variant]),
    /// A list of objects with these members.
    Objects(&'static [ArgumentSpec]),
}

/// A type that a union has, and its members.
pub type Variant = (&'static str, &'static [ArgumentSpec]);

impl CommandSpec {
    /// A command with these arguments, that returns nothing.
    pub const fn new(name: &'static str, arguments: &'static [ArgumentSpec]) -> Self {
        CommandSpec { name, arguments, returns: "{}", out_of_band: false }
    }

    /// What the command returns.
    #[must_use]
    pub const fn returning(self, returns: &'static str) -> Self {
        CommandSpec { returns, ..self }
    }

    /// The command never waits, and may be executed out of band.
    #[must_use]
    pub const fn allow_oob(self) -> Self {
        CommandSpec { out_of_band: true, ..self }
    }

    /// Checks arguments against the description, before anything has been done.
    pub(super) fn check(&self, arguments: &Map<String, Value>) -> Result<(), CommandError> {
        check_members("", self.arguments, arguments)
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
}

impl ArgumentKind {
    /// The name of the type in error messages.
    pub const fn type_name(self) -> &'static str {
        match self {
            ArgumentKind::String | ArgumentKind::Enum(_) => "string",
            ArgumentKind::Boolean => "boolean",
            ArgumentKind::Integer => "integer",
            ArgumentKind::Number => "number",
            ArgumentKind::Strings | ArgumentKind::Objects(_) => "array",
            ArgumentKind::Object(_) | ArgumentKind::Union(_) => "object",
        }
    }

    /// Checks a value; `path` is what the argument is called in messages.
    fn check(self, path: &str, value: &Value) -> Result<(), CommandError> {
        let misfit = |path: &str, expected: &str| {
            usage(format!("Invalid parameter type for '{path}', expected: {expected}"))
        };
        match (self, value) {
            (ArgumentKind::String, Value::String(_)) | (ArgumentKind::Boolean, Value::Bool(_)) => {
                Ok(())
            }
            (ArgumentKind::Number, Value::Number(_)) => Ok(()),
            (ArgumentKind::Integer, value) if value.is_i64() || value.is_u64() => Ok(()),
            (ArgumentKind::Enum(allowed), Value::String(text)) => check_one_of(path, allowed, text),
            (ArgumentKind::Strings, Value::Array(list)) => {
                match list.iter().position(|entry| !entry.is_string()) {
                    Some(index) => misfit(&format!("{path}[{index}]"), "string"),
                    None => Ok(()),
                }
            }
            (ArgumentKind::Objects(members), Value::Array(list)) => {
                for (index, entry) in list.iter().enumerate() {
                    ArgumentKind::Object(members).check(&format!("{path}[{index}]"), entry)?;
                }
                Ok(())
            }
            (ArgumentKind::Object(members), Value::Object(given)) => {
                check_members(&format!("{path}."), members, given)
            }
            (ArgumentKind::Union(variants), Value::Object(given)) => {
                check_union(path, variants, given)
            }
            (kind, _) => misfit(path, kind.type_name()),
        }
    }
}

/// `prefix` leads to these members in messages: empty, or ended by a dot.
fn check_members(
    prefix: &str,
    members: &[ArgumentSpec],
    given: &Map<String, Value>,
) -> Result<(), CommandError> {
    for member in members {
        let path = format!("{prefix}{}", member.name);
        match given.get(member.name) {
            Some(value) => member.kind.check(&path, value)?,
            None if member.required => return usage(format!("Parameter '{path}' is missing")),
            None => {}
        }
    }
    match given.keys().find(|key| members.iter().all(|m| m.name != key.as_str())) {
        Some(unknown) => usage(format!("Parameter '{prefix}{unknown}' is unexpected")),
        None => Ok(()),
    }
}

fn check_union(
    path: &str,
    variants: &[Variant],
    given: &Map<String, Value>,
) -> Result<(), CommandError> {
    let tag = ArgumentSpec::required("type", ArgumentKind::String);
    let data = |members| [tag, ArgumentSpec::required("data", ArgumentKind::Object(members))];
    let name = given.get("type").and_then(Value::as_str);
    if let Some(name) = name
        && let Some((_, members)) = variants.iter().find(|(variant, _)| *variant == name)
    {
        // A table that lives as long as this call: the members are constants, the list is not.
        return check_members(&format!("{path}."), &data(members), given);
    }
    match name {
        Some(name) => usage(format!("Parameter '{path}.type' does not accept value '{name}'")),
        None => check_members(&format!("{path}."), &[tag], given),
    }
}

fn check_one_of(path: &str, allowed: &[&str], text: &str) -> Result<(), CommandError> {
    match allowed.contains(&text) {
        true => Ok(()),
        false => usage(format!("Parameter '{path}' does not accept value '{text}'")),
    }
}

fn usage(desc: String) -> Result<(), CommandError> {
    Err(CommandError::new(ErrorClass::GenericError, 2, desc))
}
