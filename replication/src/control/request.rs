use serde_json::{Map, Value};

use super::CommandError;

/// A command as a client sent it. The command's name and arguments are not checked yet.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) command: String,
    pub(super) arguments: Map<String, Value>,
    pub(super) id: Option<Value>,
}

/// A message that is no command: the answer, and the id that could still be read.
#[derive(Debug)]
pub(super) struct Malformed {
    pub(super) error: CommandError,
    pub(super) id: Option<Value>,
}

impl Request {
    pub(super) fn parse(message: Value) -> Result<Self, Malformed> {
        let Value::Object(mut members) = message else {
            return Err(malformed("QMP input must be a JSON object".into(), None));
        };
        let id = members.remove("id");
        match Self::from_members(members) {
            Ok((command, arguments)) => Ok(Request { command, arguments, id }),
            Err(desc) => Err(malformed(desc, id)),
        }
    }

    fn from_members(
        mut members: Map<String, Value>,
    ) -> Result<(String, Map<String, Value>), String> {
        let command = members.remove("execute");
        let arguments = members.remove("arguments");
        if let Some((unknown, _)) = members.iter().next() {
            return Err(format!("QMP input member '{unknown}' is unexpected"));
        }
        let command = match command {
            Some(Value::String(command)) => command,
            Some(_) => return Err("QMP input member 'execute' must be a string".into()),
            None => return Err("QMP input lacks member 'execute'".into()),
        };
        let arguments = match arguments {
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err("QMP input member 'arguments' must be an object".into()),
            None => Map::new(),
        };
        Ok((command, arguments))
    }
}

fn malformed(desc: String, id: Option<Value>) -> Malformed {
    Malformed { error: CommandError::usage(desc), id }
}
