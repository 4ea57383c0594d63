//! `brep status`: one screen for people, one object for programs.
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use brep_replication::status::{
    DiskState, DiskStatus, ErrorStatus, HeldStatus, LinkState, ResyncStatus, Role, Status,
    TestStatus,
};
use serde_json::Value;

use super::control::connect;
use crate::args::StatusArgs;
use crate::exit::{Failure, OK, Outcome};
use crate::output::{Cell, Colour, Paint, Table};
use crate::{output, units};

pub(crate) fn run(args: &StatusArgs) -> Outcome {
    let mut client = connect(&args.control)?;
    let Some(interval) = args.watch else {
        show(&client.execute("query-status", Value::Null)?, args)?;
        return Ok(OK);
    };
    loop {
        let answer = client.execute("query-status", Value::Null)?;
        if !args.control.json && std::io::stdout().is_terminal() {
            output::line("\x1b[H\x1b[2J")?;
        }
        show(&answer, args)?;
        std::thread::sleep(interval);
    }
}

fn show(answer: &Value, args: &StatusArgs) -> Result<(), Failure> {
    match (args.control.json, args.watch) {
        (true, None) => output::json(answer),
        (true, Some(_)) => output::line(&answer.to_string()),
        (false, _) => {
            let status: Status = serde_json::from_value(answer.clone()).map_err(|error| {
                Failure::failed(format!("the instance is of another version ({error}): use --json"))
            })?;
            output::line(render(&status, Paint::for_stdout()).trim_end())
        }
    }
}

/// One screen: who and where, how far, each disk, what happened, what to do.
fn render(status: &Status, paint: Paint) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail, here and below.
    let _ = writeln!(text, "{}", headline(status, paint));
    let _ = writeln!(text, "{}\n", progress(status));
    text.push_str(&disks(status).render(paint));
    let _ = write!(text, "\n{}", counters(status));
    for error in &status.errors {
        let disk = if error.disk.is_empty() { "group" } else { &error.disk };
        let when = times(error, now_s());
        let _ =
            write!(text, "\n{} {disk}: {} ({when})", paint.apply(Colour::Red, "!"), error.message);
    }
    if status.guest_stopped {
        let _ = write!(
            text,
            "\nthe guest is stopped: its requests wait for `cont` on the control socket"
        );
    }
    if let Some(held) = status.held_writes {
        let held = units::count(held);
        let _ = write!(text, "\nheld writes    {held}: the guest waits for the secondary");
    }
    if let Some(held) = &status.held {
        let _ = write!(text, "\nheld           {}", self::held(held));
    }
    if let Some(test) = &status.test {
        let _ = write!(text, "\ntest view      {}", test_view(test));
    }
    if let Some(running) = &status.resync {
        let _ = write!(text, "\nresync         {}", resync(running));
    }
    for lapsed in &status.lapsed {
        let _ = write!(text, "\n{} {lapsed}", paint.apply(Colour::Yellow, "not promised:"));
    }
    if let Some(reason) = &status.reason {
        let _ = write!(text, "\n{} {reason}", paint.apply(Colour::Yellow, "why:"));
    }
    if let Some(advice) = &status.advice {
        let _ = write!(text, "\n{} {advice}", paint.apply(Colour::Bold, "do: "));
    }
    text.push('\n');
    text
}

fn headline(status: &Status, paint: Paint) -> String {
    let role = match status.role {
        Role::Primary => "primary",
        Role::Secondary => "secondary",
        Role::Promoted => "promoted",
    };
    let peer = status.peer.as_deref().unwrap_or("the peer");
    let link = match status.link {
        LinkState::None => paint.apply(Colour::Yellow, "no peer"),
        LinkState::Disconnected => paint.apply(Colour::Yellow, &format!("not connected to {peer}")),
        LinkState::Refused => paint.apply(Colour::Red, &format!("refused by {peer}")),
        LinkState::Connected => paint.apply(Colour::Green, &format!("connected to {peer}")),
    };
    let mut line = format!("{} · {role} · {link}", paint.apply(Colour::Bold, &status.name));
    if let Some(tls) = &status.tls {
        let _ = write!(line, ", {} with {}", tls.version, tls.subject);
    }
    match status.last_contact_ms {
        Some(contact) if status.link != LinkState::Connected => {
            let _ = write!(line, ", last heard of {} ago", units::age(contact));
        }
        _ => {}
    }
    line
}

fn progress(status: &Status) -> String {
    let mut parts = Vec::new();
    parts.push(match (status.checkpoint, status.checkpoint_age_ms) {
        (Some(epoch), Some(age)) => format!("checkpoint {epoch}, {} old", units::age(age)),
        (Some(epoch), None) => format!("checkpoint {epoch}"),
        (None, _) => "no checkpoint yet".into(),
    });
    parts.push(format!("epoch {}", status.epoch));
    if let Some(ack) = &status.ack {
        parts.push(format!("ack {ack}"));
    }
    parts.push(match status.peer_durability.as_deref() {
        Some(theirs) if theirs != status.durability => {
            format!("durability {} here, {theirs} on the peer", status.durability)
        }
        _ => format!("durability {}", status.durability),
    });
    let promotable = status.promotable.filter(|_| status.role == Role::Secondary);
    match (promotable, status.latest_ok) {
        (Some(true), Some(true)) => parts.push("can fail over to checkpoint or latest".into()),
        (Some(true), _) => parts.push("can fail over to checkpoint".into()),
        (Some(false), _) => parts.push("cannot fail over".into()),
        (None, _) => {}
    }
    parts.join(" · ")
}

fn disks(status: &Status) -> Table {
    let mut table = Table::new(vec![
        Cell::left("DISK"),
        Cell::left("STATE"),
        Cell::right("SIZE"),
        Cell::right("BEHIND"),
        Cell::right("PRE-IMAGES"),
        Cell::left("FILE"),
    ]);
    for disk in &status.disks {
        let (state, colour) = state(disk);
        let hidden = disk.hidden_bytes.map_or("–".into(), units::bytes);
        table.row(vec![
            Cell::left(&disk.name),
            Cell::left(state).colour(colour),
            Cell::right(units::bytes(disk.size)),
            Cell::right(if status.role == Role::Secondary {
                "–".into()
            } else {
                units::bytes(disk.bytes_behind)
            }),
            Cell::right(hidden),
            Cell::left(&disk.file),
        ]);
    }
    table
}

fn state(disk: &DiskStatus) -> (String, Colour) {
    let percent = || match disk.progress {
        Some(progress) if progress.total > 0 => {
            format!(" {} %", u128::from(progress.done) * 100 / u128::from(progress.total))
        }
        _ => String::new(),
    };
    match disk.state {
        DiskState::InSync => ("in sync".into(), Colour::Green),
        DiskState::Resyncing => (format!("resyncing{}", percent()), Colour::Yellow),
        DiskState::Disconnected => ("disconnected".into(), Colour::Yellow),
        DiskState::Inconsistent => (format!("inconsistent{}", percent()), Colour::Red),
        DiskState::Joining => (format!("joining{}", percent()), Colour::Yellow),
        DiskState::Promoting => (format!("promoted, merging{}", percent()), Colour::Yellow),
        DiskState::Held => ("promoted, held".into(), Colour::Yellow),
        DiskState::Promoted => ("promoted".into(), Colour::Green),
        DiskState::Alone => ("alone".into(), Colour::Yellow),
        DiskState::Outdated => ("outdated".into(), Colour::Red),
        DiskState::SplitBrain => ("split brain".into(), Colour::Red),
        DiskState::Failed => ("failed".into(), Colour::Red),
    }
}

/// A failover that can be undone, in one line.
fn held(held: &HeldStatus) -> String {
    let mut parts = vec![
        format!("for {}", units::age(held.age_ms)),
        format!("at most {} written", units::bytes(held.written_bytes)),
    ];
    if let Some(space) = held.space_bytes {
        parts.push(format!("room for {}", units::bytes(space)));
    }
    parts.join(" · ")
}

/// How often a failure was seen, and when: one of last week is not what is wrong now.
fn times(error: &ErrorStatus, now_s: u64) -> String {
    let ago = |then_s: u64| units::age(now_s.saturating_sub(then_s).saturating_mul(1000));
    match error.count {
        0 | 1 => format!("{} ago", ago(error.last_s)),
        count => format!("{} times, last {} ago", units::count(count), ago(error.last_s)),
    }
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A scratch view of a checkpoint, in one line.
fn test_view(test: &TestStatus) -> String {
    let mut parts = vec![test.name.clone()];
    if let Some(epoch) = test.checkpoint {
        parts.push(format!("checkpoint {epoch}"));
    }
    match &test.ended {
        Some(reason) => parts.push(format!("ended: {reason}")),
        None => {
            parts.extend(test.age_ms.map(|age| format!("open for {}", units::age(age))));
            parts.push(format!("at most {} written", units::bytes(test.written_bytes)));
            parts.push(format!("{} kept for it", units::bytes(test.kept_bytes)));
        }
    }
    parts.join(" · ")
}

/// How far a resync is, in one line.
pub(super) fn resync(resync: &ResyncStatus) -> String {
    let mut parts = Vec::new();
    if let Some(percent) = (u128::from(resync.done) * 100).checked_div(u128::from(resync.total)) {
        parts.push(format!("{percent} %"));
    }
    parts.push(format!("{} of {}", units::bytes(resync.done), units::bytes(resync.total)));
    parts.push(format!("{}/s", units::bytes(resync.rate)));
    if let Some(left) = resync.left_s {
        parts.push(format!("{} left", units::age(left.saturating_mul(1000))));
    }
    let mut limits = Vec::new();
    if let Some(rate) = resync.rate_limit {
        limits.push(format!("{}/s", units::bytes(rate)));
    }
    if let Some(factor) = resync.latency_factor {
        limits.push(format!("{factor} times the guest's latency"));
    }
    if !limits.is_empty() {
        parts.push(format!("limited to {}", limits.join(" and ")));
    }
    parts.join(" · ")
}

fn counters(status: &Status) -> String {
    let counters = &status.counters;
    let mut text = String::new();
    let writes = |count, bytes| format!("{} writes, {}", units::count(count), units::bytes(bytes));
    if status.role != Role::Secondary || counters.guest_writes > 0 {
        let guest = writes(counters.guest_writes, counters.guest_write_bytes);
        let _ = writeln!(text, "by the guest   {guest}");
    }
    let replicated = writes(counters.replicated_writes, counters.replicated_bytes);
    let _ = writeln!(text, "replicated     {replicated}");
    let _ = write!(text, "checkpoints    {}", units::count(counters.checkpoints));
    if counters.last_pause_us > 0 {
        let pause = units::duration(Duration::from_micros(counters.last_pause_us));
        let _ = write!(text, ", the last one paused forwarding for {pause}");
    }
    if counters.preimage_bytes > 0 {
        let kept = units::bytes(counters.preimage_bytes);
        let _ = write!(text, "\npre-images     {kept} written");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use brep_replication::node::Stage;
    use brep_replication::status::{Counters, Progress, TlsStatus};

    fn disk() -> DiskStatus {
        DiskStatus {
            merging: None,
            name: "vda".into(),
            file: "/d/vda.raw".into(),
            size: 10 << 30,
            state: DiskState::InSync,
            bytes_behind: 0,
            progress: None,
            hidden_bytes: None,
            guest_wrote: None,
        }
    }

    fn status() -> Status {
        Status {
            sequence: 0,
            name: "host-a".into(),
            role: Role::Primary,
            replication: Stage::Running,
            lapsed: Vec::new(),
            guest_stopped: false,
            pid: 7,
            set: None,
            cur: None,
            epoch: 42,
            checkpoint: Some(41),
            checkpoint_age_ms: Some(400),
            peer: Some("127.0.0.1:10809".into()),
            link: LinkState::Connected,
            tls: None,
            last_contact_ms: Some(3),
            reason: None,
            advice: None,
            differences: None,
            ack: Some("sync".into()),
            durability: "power".into(),
            peer_durability: Some("power".into()),
            promotable: None,
            latest_ok: None,
            held_writes: None,
            held: None,
            test: None,
            resync: None,
            disks: vec![disk()],
            errors: Vec::new(),
            counters: Counters { guest_writes: 1234, last_pause_us: 340, ..Counters::default() },
        }
    }

    #[test]
    fn a_healthy_primary_is_one_screen() {
        let text = render(&status(), Paint::plain());
        assert!(text.starts_with("host-a · primary · connected to 127.0.0.1:10809\n"), "{text}");
        assert!(
            text.contains("checkpoint 41, less than a second old · epoch 42 · ack sync"),
            "{text}"
        );
        assert!(
            text.contains("vda    in sync   10 GiB      0 B            –   /d/vda.raw"),
            "{text}"
        );
        assert!(text.contains("1\u{a0}234 writes"), "{text}");
        assert!(!text.contains("why:") && !text.contains("do:"), "{text}");
    }

    #[test]
    fn an_encrypted_link_says_with_whom() {
        let mut status = status();
        status.tls = Some(TlsStatus { version: "TLS 1.3".into(), subject: "CN=beta".into() });
        let text = render(&status, Paint::plain());
        assert!(text.contains("127.0.0.1:10809, TLS 1.3 with CN=beta\n"), "{text}");
    }

    #[test]
    fn trouble_comes_with_its_reason_and_the_way_out() {
        let mut status = status();
        status.link = LinkState::Disconnected;
        status.last_contact_ms = Some(5_200);
        status.reason = Some("the secondary did not answer within 5 s".into());
        status.advice = Some("brep resync --full".into());
        status.disks[0].state = DiskState::Disconnected;
        status.disks[0].bytes_behind = 3 << 20;
        let text = render(&status, Paint::plain());
        assert!(
            text.contains("not connected to 127.0.0.1:10809, last heard of 5.2 s ago"),
            "{text}"
        );
        assert!(text.contains("disconnected") && text.contains("3 MiB"), "{text}");
        assert!(text.contains("why: the secondary did not answer"), "{text}");
        assert!(text.contains("do:  brep resync --full"), "{text}");
    }

    #[test]
    fn sides_that_promise_different_things_are_told() {
        let mut status = status();
        assert!(render(&status, Paint::plain()).contains("· durability power\n"));
        status.peer_durability = Some("process".into());
        let text = render(&status, Paint::plain());
        assert!(text.contains("durability power here, process on the peer"), "{text}");
    }

    #[test]
    fn only_a_secondary_says_what_it_can_fail_over_to() {
        let mut status = status();
        status.promotable = Some(true);
        status.latest_ok = Some(true);
        for (role, offered) in [(Role::Secondary, true), (Role::Promoted, false)] {
            status.role = role;
            let text = render(&status, Paint::plain());
            assert_eq!(text.contains("can fail over to checkpoint or latest"), offered, "{text}");
        }
    }

    #[test]
    fn a_resync_is_one_line() {
        let mut running = ResyncStatus {
            done: 25 << 20,
            total: 100 << 20,
            rate: 5 << 20,
            left_s: Some(15),
            rate_limit: Some(5 << 20),
            latency_factor: None,
            paced_rate: Some(5 << 20),
        };
        assert_eq!(
            resync(&running),
            "25 % · 25 MiB of 100 MiB · 5 MiB/s · 15.0 s left · limited to 5 MiB/s"
        );
        running = ResyncStatus { total: 0, done: 0, rate: 0, left_s: None, ..running };
        assert!(resync(&running).starts_with("0 B of 0 B · 0 B/s"));
        let status = Status { resync: Some(running), ..status() };
        assert!(render(&status, Paint::plain()).contains("resync         0 B of"));
    }

    #[test]
    fn a_failover_that_is_held_says_how_long_and_how_much_room_there_is() {
        let mut status = status();
        status.held = Some(HeldStatus {
            since_s: 0,
            age_ms: 125_000,
            written_bytes: 3 << 20,
            space_bytes: Some(7 << 30),
        });
        status.disks[0].state = DiskState::Held;
        let text = render(&status, Paint::plain());
        assert!(text.contains("promoted, held"), "{text}");
        assert!(text.contains("at most 3 MiB written · room for 7 GiB"), "{text}");
    }

    #[test]
    fn an_error_says_how_long_ago_it_was() {
        let mut error = ErrorStatus {
            disk: "vda".into(),
            operation: "write".into(),
            offset: 0,
            length: 4096,
            errno: 28,
            message: "no space".into(),
            count: 1,
            first_s: 1_000,
            last_s: 1_000,
        };
        assert_eq!(times(&error, 1_300), "5 min ago");
        error.count = 1_200;
        error.last_s = 1_300;
        assert_eq!(times(&error, 1_300), "1\u{a0}200 times, last less than a second ago");
        assert_eq!(times(&error, 0), "1\u{a0}200 times, last less than a second ago", "set back");
        let status = Status { errors: vec![error], ..status() };
        assert!(
            render(&status, Paint::plain()).contains("! vda: no space (1\u{a0}200 times, last ")
        );
    }

    #[test]
    fn a_merge_shows_how_far_it_is() {
        let mut merging = disk();
        merging.state = DiskState::Promoting;
        merging.progress = Some(Progress { done: 1 << 20, total: 4 << 20 });
        assert_eq!(state(&merging).0, "promoted, merging 25 %");
        merging.progress = Some(Progress { done: 0, total: 0 });
        assert_eq!(state(&merging).0, "promoted, merging");
    }
}
