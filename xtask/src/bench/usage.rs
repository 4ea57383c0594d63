//! What processes have used: processor time, and how often they were switched to.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

/// What this process and a server have used so far.
pub(crate) struct Usage {
    own_s: f64,
    server: Option<Server>,
}

struct Server {
    user_s: f64,
    system_s: f64,
    /// Of the threads that there are.
    switches: f64,
}

impl Usage {
    pub(crate) fn now(server_pid: Option<u32>) -> Result<Self> {
        let (user_s, system_s) = times("self")?;
        let server = server_pid.map(|pid| Server::now(&pid.to_string())).transpose()?;
        Ok(Usage { own_s: user_s + system_s, server })
    }

    pub(crate) fn since(self, before: &Usage) -> Usage {
        let server = self.server.zip(before.server.as_ref()).map(|(now, before)| Server {
            user_s: now.user_s - before.user_s,
            system_s: now.system_s - before.system_s,
            switches: now.switches - before.switches,
        });
        Usage { own_s: self.own_s - before.own_s, server }
    }
}

impl Server {
    fn now(pid: &str) -> Result<Self> {
        let (user_s, system_s) = times(pid)?;
        Ok(Server { user_s, system_s, switches: switches(pid)? })
    }
}

/// Adds what one operation has cost, in microseconds, and how much of a processor each used.
pub(crate) fn report(
    used: &Usage,
    operations: f64,
    elapsed: Duration,
    report: &mut serde_json::Value,
) {
    let elapsed_s = elapsed.as_secs_f64();
    report["load_processors"] = (used.own_s / elapsed_s).into();
    if let Some(server) = &used.server {
        let total_s = server.user_s + server.system_s;
        report["server_processors"] = (total_s / elapsed_s).into();
        report["server_us"] = (total_s * 1e6 / operations).into();
        report["server_user_us"] = (server.user_s * 1e6 / operations).into();
        report["server_switches"] = (server.switches / operations).into();
    }
}

/// Seconds of a process in user and in kernel mode, ended threads included.
fn times(pid: &str) -> Result<(f64, f64)> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| path.clone())?;
    // The name before it may hold anything.
    let (_, fields) = stat.rsplit_once(')').with_context(|| path.clone())?;
    let ticks = |index| {
        let field = fields.split_ascii_whitespace().nth(index).with_context(|| path.clone())?;
        Ok::<_, anyhow::Error>(
            field.parse::<f64>()? / rustix::param::clock_ticks_per_second() as f64,
        )
    };
    Ok((ticks(11)?, ticks(12)?))
}

fn switches(pid: &str) -> Result<f64> {
    let mut sum = 0.0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may have ended since.
        let Ok(status) = fs::read_to_string(thread?.path().join("status")) else { continue };
        let lines = status.lines().filter_map(|line| line.split_once("ctxt_switches:"));
        for (_, count) in lines {
            sum += count.trim().parse::<f64>()?;
        }
    }
    Ok(sum)
}
