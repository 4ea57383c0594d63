//! `brep events`: the present state, then what happens, a line each.
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use brep_replication::control::{ControlClient, Event};
use brep_replication::status::{State, Status};
use serde_json::{Map, Value, json};

use super::control::connect;
use crate::args::EventsArgs;
use crate::exit::{Failure, Outcome};
use crate::output;

/// How long nothing at all may come before it is asked whether the instance still answers.
const QUIET: Duration = Duration::from_secs(10);

/// Ends with the instance, or when nobody reads any more.
pub(crate) fn run(args: &EventsArgs) -> Outcome {
    let mut client = connect(&args.control)?;
    let mut printer = Printer { json: args.control.json, state: None };
    let (mut known, state) = present(&mut client)?;
    printer.print(&state)?;
    loop {
        let Some(event) = client.next_event(QUIET)? else {
            // An instance that hangs is told as such, with its exit code.
            client.execute("query-version", Value::Null)?;
            continue;
        };
        let Some(number) = event.sequence else {
            // `EVENTS_LOST`: the numbers tell the same, and of losses in this program too.
            continue;
        };
        if number <= known {
            continue;
        }
        if number == known + 1 {
            known = number;
            printer.print(&event)?;
            continue;
        }
        // What has happened up to the state that is told now is not told any more.
        let (contained, state) = present(&mut client)?;
        printer.print(&of_this_client(
            "EVENTS_LOST",
            json!({ "count": contained.saturating_sub(known) }),
        ))?;
        printer.print(&state)?;
        known = contained;
    }
}

/// The present state, and the number of the last event that it contains.
fn present(client: &mut ControlClient) -> Result<(u64, Event), Failure> {
    let status: Status = serde_json::from_value(client.execute("query-status", Value::Null)?)
        .context("query-status: the instance is of another version")?;
    let state = of_this_client("BREP_STATE", json!(status.state()));
    Ok((status.sequence, Event { sequence: Some(status.sequence), ..state }))
}

/// An event that the instance has not sent.
fn of_this_client(name: &str, data: Value) -> Event {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(now.as_secs()).unwrap_or(-1);
    let timestamp = (seconds, i64::from(now.subsec_micros()));
    Event { name: name.to_owned(), data, timestamp, sequence: None }
}

struct Printer {
    json: bool,
    /// What was told last: of a state only what has changed is printed for people.
    state: Option<State>,
}

impl Printer {
    fn print(&mut self, event: &Event) -> Result<(), Failure> {
        if self.json {
            let (seconds, microseconds) = event.timestamp;
            let mut told = json!({
                "event": event.name,
                "timestamp": { "seconds": seconds, "microseconds": microseconds },
            });
            if let Some(number) = event.sequence {
                told["sequence"] = json!(number);
            }
            if !event.data.is_null() {
                told["data"] = event.data.clone();
            }
            return output::line(&told.to_string());
        }
        let number = event.sequence.map_or_else(|| "-".to_owned(), |number| number.to_string());
        let what = match serde_json::from_value::<State>(event.data.clone()) {
            Ok(state) if event.name == "BREP_STATE" => {
                let text = changes(self.state.as_ref(), &state);
                self.state = Some(state);
                text
            }
            _ => members(&event.data),
        };
        let line = format!("{}  {number:>5}  {:<20}  {what}", time(event.timestamp), event.name);
        output::line(line.trim_end())
    }
}

/// In UTC, to the millisecond.
fn time((seconds, microseconds): (i64, i64)) -> String {
    let since = u64::try_from(seconds).ok().zip(u64::try_from(microseconds).ok());
    let since = since.map(|(s, us)| Duration::from_secs(s) + Duration::from_micros(us));
    match since.and_then(|since| UNIX_EPOCH.checked_add(since)) {
        Some(time) => humantime::format_rfc3339_millis(time).to_string(),
        None => "no clock".to_owned(),
    }
}

/// The members of a state that differ from the one before; those that have gone as null.
fn changes(before: Option<&State>, now: &State) -> String {
    let (before, now) = (before.map(flat).unwrap_or_default(), flat(now));
    let gone = before.keys().filter(|name| !now.contains_key(*name));
    let gone = gone.map(|name| member(name, &Value::Null));
    let changed = now.iter().filter_map(|(name, value)| {
        let old = before.get(name).unwrap_or(&Value::Null);
        (old != value).then(|| member(name, value))
    });
    changed.chain(gone).collect::<Vec<_>>().join("  ")
}

/// A state with its disks as members of their own, each with its state.
fn flat(state: &State) -> Map<String, Value> {
    let mut members = match json!(state) {
        Value::Object(members) => members,
        _ => Map::new(),
    };
    members.remove("disks");
    for disk in &state.disks {
        members.insert(format!("disk {}", disk.name), json!(disk.state));
        members.insert(format!("disk {} size", disk.name), json!(disk.size));
    }
    members
}

fn members(data: &Value) -> String {
    let members = data.as_object().into_iter().flatten();
    members.map(|(name, value)| member(name, value)).collect::<Vec<_>>().join("  ")
}

fn member(name: &str, value: &Value) -> String {
    match value {
        Value::String(text) if !text.contains(' ') => format!("{name}={text}"),
        Value::Null => format!("{name}=-"),
        value => format!("{name}={value}"),
    }
}

#[cfg(test)]
mod tests {
    use brep_replication::node::Stage;
    use brep_replication::status::{DiskState, LinkState, Role, StateOfDisk};

    use super::*;

    fn state() -> State {
        State {
            role: Role::Primary,
            replication: Stage::Running,
            link: LinkState::Connected,
            peer: Some("127.0.0.1:10809".into()),
            promotable: None,
            latest_ok: None,
            guest_stopped: false,
            writes_held: false,
            reason: None,
            advice: None,
            disks: vec![StateOfDisk { name: "vda".into(), state: DiskState::InSync, size: 512 }],
        }
    }

    #[test]
    fn of_a_later_state_only_the_changes_are_told() {
        let first = changes(None, &state());
        assert!(first.contains("role=primary") && first.contains("disk vda=in-sync"), "{first}");
        let mut later = state();
        later.link = LinkState::Disconnected;
        later.reason = Some("no answer within 5 s".into());
        later.disks[0].state = DiskState::Disconnected;
        assert_eq!(
            changes(Some(&state()), &later),
            "disk vda=disconnected  link=disconnected  reason=\"no answer within 5 s\""
        );
        assert_eq!(changes(Some(&later), &state()), "disk vda=in-sync  link=connected  reason=-");
        assert_eq!(changes(Some(&later), &later), "");
        later.disks.clear();
        let gone = changes(Some(&state()), &later);
        assert!(gone.ends_with("disk vda=-  disk vda size=-"), "{gone}");
    }

    #[test]
    fn times_are_in_utc() {
        assert_eq!(time((1_700_000_000, 123_999)), "2023-11-14T22:13:20.123Z");
        assert_eq!(time((-1, -1)), "no clock");
    }
}
