//! The listening socket: private to its user, and never taken from an instance that lives.
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Binds a socket of mode 0600, replacing one whose owner is gone.
///
/// The socket appears under its name only when nobody else can connect to it any more: it is
/// bound under another name, restricted, and renamed.
pub(super) fn bind(path: &Path) -> io::Result<UnixListener> {
    refuse_if_in_use(path)?;
    let hidden = hidden_name(path);
    match fs::remove_file(&hidden) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&hidden, error)),
        _ => {}
    }
    let listener = UnixListener::bind(&hidden).map_err(|error| at(path, error))?;
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600))
        .and_then(|()| fs::rename(&hidden, path))
        .and_then(|()| listener.set_nonblocking(true))
        .map_err(|error| at(path, error))?;
    Ok(listener)
}

fn refuse_if_in_use(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(at(path, error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            let error = io::Error::new(io::ErrorKind::AlreadyExists, "exists and is not a socket");
            return Err(at(path, error));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(at(
            path,
            io::Error::new(io::ErrorKind::AddrInUse, "another instance is listening here"),
        )),
        Err(_) => Ok(()),
    }
}

fn hidden_name(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push("~");
    name.into()
}

fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
