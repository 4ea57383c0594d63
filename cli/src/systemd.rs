//! What a service manager passes to a process, and wants to hear of it.
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use crate::exit::Failure;

/// The first descriptor that is passed.
const FIRST_FD: i32 = 3;
/// More sockets than anybody passes.
const FDS_MAX: i32 = 64;

/// The sockets that were passed to this process (`LISTEN_FDS`, `LISTEN_PID`). To be called once,
/// before anything else has opened files.
pub(crate) fn listen_fds() -> Result<Vec<OwnedFd>, Failure> {
    let count = count(std::env::var_os("LISTEN_PID"), std::env::var_os("LISTEN_FDS"))?;
    let fds = FIRST_FD..FIRST_FD + count;
    if let Some(fd) = fds.clone().find(|fd| !is_open(*fd)) {
        let said = format!("LISTEN_FDS={count}, and descriptor {fd} is not open");
        return Err(Failure::usage(said));
    }
    Ok(fds.map(take).collect())
}

/// How many descriptors are meant for this process.
fn count(pid: Option<OsString>, fds: Option<OsString>) -> Result<i32, Failure> {
    let number = |text: &OsString| text.to_str().and_then(|text| text.parse::<i32>().ok());
    // Set for another process, which has left it in our environment.
    if pid.as_ref().and_then(number) != i32::try_from(std::process::id()).ok() {
        return Ok(0);
    }
    match fds.as_ref().map(number) {
        None => Ok(0),
        Some(Some(count)) if (0..=FDS_MAX).contains(&count) => Ok(count),
        Some(_) => Err(Failure::usage(format!(
            "LISTEN_FDS={:?}: a number from 0 to {FDS_MAX}",
            fds.unwrap_or_default()
        ))),
    }
}

fn is_open(fd: i32) -> bool {
    std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok()
}

#[allow(unsafe_code, reason = "a descriptor that was passed by number has no other way in")]
fn take(fd: i32) -> OwnedFd {
    use std::os::fd::FromRawFd;

    // SAFETY: the descriptor is open, and `LISTEN_PID` says that it was passed to this process;
    // nothing else in it knows the number, and this is called once.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // What is run from here has no use for it; that it gets it is no harm.
    let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
    fd
}

/// Tells the service manager, if there is one. That it does not listen is not our concern.
pub(crate) fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let sent = address
        .and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::debug!("the service manager was not told {state}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit;

    #[test]
    fn sockets_of_another_process_are_left_alone() {
        let own = || Some(OsString::from(std::process::id().to_string()));
        let text = |text: &str| Some(OsString::from(text));
        assert_eq!(count(own(), text("2")).unwrap(), 2);
        assert_eq!(count(own(), None).unwrap(), 0);
        assert_eq!(count(text("1"), text("2")).unwrap(), 0);
        assert_eq!(count(None, text("2")).unwrap(), 0);
        for bad in ["-1", "65", "two", ""] {
            assert_eq!(count(own(), text(bad)).unwrap_err().code, exit::USAGE, "{bad}");
        }
    }
}
