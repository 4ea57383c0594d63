use serde_json::{Map, Value};

use super::CommandError;

/// A command as a client sent it. The command's name and arguments are not checked yet.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) command: String,
    pub(super) arguments: Map<String, Value>,
    pub(super) id: Option<Value>,
    /// To be executed at once, whatever else is queued or going on.
    pub(super) out_of_band: bool,
}

/// A message that is no command: the answer, and the id that could still be read.
#[derive(Debug)]
pub(super) struct Malformed {
    pub(super) error: CommandError,
    pub(super) id: Option<Value>,
}

impl Request {
    /// Reads a message. `oob`: the client has enabled out-of-band execution.
    pub(super) fn parse(message: Value, oob: bool) -> Result<Self, Malformed> {
        let Value::Object(mut members) = message else {
            return Err(malformed("QMP input must be a JSON object".into(), None));
        };
        let id = members.remove("id");
        match Self::from_members(members, oob) {
            Ok(request) => Ok(Request { id, ..request }),
            Err(desc) => Err(malformed(desc, id)),
        }
    }

    fn from_members(mut members: Map<String, Value>, oob: bool) -> Result<Self, String> {
        let execute = members.remove("execute");
        // Where it was not enabled, or beside the other, it is one member too many.
        let out_of_band = oob && execute.is_none() && members.contains_key("exec-oob");
        let (member, command) = match out_of_band {
            true => ("exec-oob", members.remove("exec-oob")),
            false => ("execute", execute),
        };
        let arguments = members.remove("arguments");
        if let Some((unknown, _)) = members.iter().next() {
            return Err(format!("QMP input member '{unknown}' is unexpected"));
        }
        let command = match command {
            Some(Value::String(command)) => command,
            Some(_) => return Err(format!("QMP input member '{member}' must be a string")),
            None => return Err("QMP input lacks member 'execute'".into()),
        };
        let arguments = match arguments {
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err("QMP input member 'arguments' must be an object".into()),
            None => Map::new(),
        };
        Ok(Request { command, arguments, id: None, out_of_band })
    }
}

fn malformed(desc: String, id: Option<Value>) -> Malformed {
    Malformed { error: CommandError::usage(desc), id }
}
