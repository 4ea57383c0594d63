use std::ffi::OsString;
use std::fmt::{self, Write as _};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use crate::Endpoint;
use crate::proto::wire::{DEFAULT_PORT, STRING_LEN_MAX};

/// An NBD URI: a server, one of its exports, and whether TLS is demanded.
///
/// Accepted are `nbd://`, `nbd+tcp://`, `nbds://`, `nbd+unix://`, `nbds+unix://`, and QEMU's old
/// forms `nbd:HOST:PORT[:exportname=NAME]` and `nbd:unix:PATH[:exportname=NAME]`. It is displayed
/// as a URI that parses to an equal value.
///
/// ```
/// use brep_nbd::NbdUri;
///
/// let uri: NbdUri = "nbd://[::1]/disk%200".parse()?;
/// assert_eq!(uri.endpoint.to_string(), "[::1]:10809");
/// assert_eq!(uri.export, "disk 0");
/// # Ok::<(), brep_nbd::UriError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NbdUri {
    /// The server.
    pub endpoint: Endpoint,
    /// Name of the export; empty for the default one.
    pub export: String,
    /// Present if the scheme demands TLS.
    pub tls: Option<TlsParameters>,
}

/// What a URI says about TLS.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct TlsParameters {
    /// `tls-type`: how the server is authenticated.
    pub kind: Option<TlsKind>,
    /// `tls-hostname`: the name that the server's certificate must carry, if not the host's.
    pub hostname: Option<String>,
    /// `tls-verify-peer`: whether the certificate is checked at all.
    pub verify_peer: Option<bool>,
    /// `tls-certificates`: the directory that the certificates are in.
    pub certificates: Option<PathBuf>,
}

/// How TLS authenticates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TlsKind {
    /// Not at all.
    Anonymous,
    /// Certificates.
    X509,
    /// A key that both sides know.
    PreSharedKey,
}

/// Why a URI was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum UriError {
    #[error("not an NBD URI (expected nbd://, nbds://, nbd+unix:// or nbds+unix://)")]
    Scheme,
    #[error("\"%\" must be followed by two hexadecimal digits")]
    Escape,
    #[error("the {0} is not UTF-8")]
    Utf8(&'static str),
    #[error("the {0} contains a NUL byte")]
    Nul(&'static str),
    #[error("the export name has {0} bytes; at most {STRING_LEN_MAX} are possible")]
    ExportNameTooLong(usize),
    #[error("no host in the URI")]
    NoHost,
    #[error("bad host {0:?}: an IPv6 address must stand in brackets")]
    Host(String),
    #[error("bad port {0:?}")]
    Port(String),
    #[error("a user name has no meaning in an NBD URI")]
    UserInfo,
    #[error("a fragment (\"#...\") has no meaning in an NBD URI; write \"#\" as %23")]
    Fragment,
    #[error("a unix socket URI has three slashes: no host may be given")]
    Authority,
    #[error("a unix socket URI needs socket=PATH")]
    NoSocket,
    #[error("unknown URI parameter {0:?}")]
    UnknownParameter(String),
    #[error("URI parameter {0:?} given twice")]
    RepeatedParameter(String),
    #[error("URI parameter {0:?} applies to {1} only")]
    MisplacedParameter(String, &'static str),
    #[error("bad value {value:?} of URI parameter {name:?}")]
    ParameterValue { name: String, value: String },
}

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        match text.split_once("://") {
            Some((scheme, rest)) if !scheme.contains(':') => {
                let (tls, unix) = match scheme.to_ascii_lowercase().as_str() {
                    "nbd" | "nbd+tcp" => (false, false),
                    "nbds" | "nbds+tcp" => (true, false),
                    "nbd+unix" => (false, true),
                    "nbds+unix" => (true, true),
                    _ => return Err(UriError::Scheme),
                };
                parse_uri(rest, tls, unix)
            }
            _ => match text.strip_prefix("nbd:") {
                Some(rest) => parse_legacy(rest),
                None => Err(UriError::Scheme),
            },
        }
    }
}

fn parse_uri(rest: &str, tls: bool, unix: bool) -> Result<NbdUri, UriError> {
    if rest.contains('#') {
        return Err(UriError::Fragment);
    }
    let (before_query, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = match before_query.find('/') {
        Some(slash) => before_query.split_at(slash),
        None => (before_query, ""),
    };
    // Exactly one slash separates; a second one is part of the name.
    let export = export_name(decode(path.strip_prefix('/').unwrap_or(path))?)?;
    let parameters = Parameters::parse(query, tls, unix)?;
    let endpoint = if unix {
        if !authority.is_empty() {
            return Err(UriError::Authority);
        }
        Endpoint::Unix { path: parameters.socket.ok_or(UriError::NoSocket)? }
    } else {
        parse_authority(authority)?
    };
    Ok(NbdUri { endpoint, export, tls: tls.then_some(parameters.tls) })
}

fn parse_authority(authority: &str) -> Result<Endpoint, UriError> {
    if authority.contains('@') {
        return Err(UriError::UserInfo);
    }
    let (host, port) = split_host_port(authority)?;
    let host = text(decode(host)?, "host")?;
    let port = match port {
        None | Some("") => DEFAULT_PORT,
        Some(port) => parse_port(port)?,
    };
    Ok(Endpoint::Tcp { host, port })
}

/// Splits `host[:port]`, takes the brackets off, and returns a host that is not empty.
fn split_host_port(authority: &str) -> Result<(&str, Option<&str>), UriError> {
    let bad = || UriError::Host(authority.to_owned());
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']').ok_or_else(bad)?;
            let port = match after {
                "" => None,
                _ => Some(after.strip_prefix(':').ok_or_else(bad)?),
            };
            (host, port)
        }
        None => match authority.split_once(':') {
            Some((_, port)) if port.contains(':') => return Err(bad()),
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    if host.is_empty() {
        return Err(UriError::NoHost);
    }
    Ok((host, port))
}

fn parse_port(port: &str) -> Result<u16, UriError> {
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    match port.parse() {
        Ok(number) if digits => Ok(number),
        _ => Err(UriError::Port(port.to_owned())),
    }
}

/// `HOST:PORT[:exportname=NAME]` or `unix:PATH[:exportname=NAME]`; nothing is percent-decoded.
fn parse_legacy(rest: &str) -> Result<NbdUri, UriError> {
    let (place, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    let export = export_name(export.as_bytes().to_vec())?;
    let endpoint = match place.strip_prefix("unix:") {
        Some("") => return Err(UriError::NoSocket),
        Some(path) => Endpoint::Unix { path: PathBuf::from(path) },
        None => {
            let (host, port) = split_host_port(place)?;
            let port = parse_port(port.unwrap_or_default())?;
            Endpoint::Tcp { host: host.to_owned(), port }
        }
    };
    Ok(NbdUri { endpoint, export, tls: None })
}

#[derive(Default)]
struct Parameters {
    socket: Option<PathBuf>,
    tls: TlsParameters,
}

impl Parameters {
    fn parse(query: &str, tls: bool, unix: bool) -> Result<Self, UriError> {
        let mut parameters = Parameters::default();
        for pair in query.split(['&', ';']).filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = text(decode(name)?, "parameter name")?;
            parameters.set(name, decode(value)?, tls, unix)?;
        }
        Ok(parameters)
    }

    fn set(&mut self, name: String, value: Vec<u8>, tls: bool, unix: bool) -> Result<(), UriError> {
        let repeated = match name.as_str() {
            "socket" if !unix => {
                return Err(UriError::MisplacedParameter(name, "unix sockets"));
            }
            "tls-type" | "tls-hostname" | "tls-verify-peer" | "tls-certificates" if !tls => {
                return Err(UriError::MisplacedParameter(name, "nbds schemes"));
            }
            "socket" => self.socket.replace(socket_path(value)?).is_some(),
            "tls-type" => self.tls.kind.replace(tls_kind(&name, value)?).is_some(),
            "tls-hostname" => self.tls.hostname.replace(text(value, "TLS host name")?).is_some(),
            "tls-verify-peer" => self.tls.verify_peer.replace(flag(&name, value)?).is_some(),
            "tls-certificates" => self.tls.certificates.replace(directory(&name, value)?).is_some(),
            _ => return Err(UriError::UnknownParameter(name)),
        };
        if repeated { Err(UriError::RepeatedParameter(name)) } else { Ok(()) }
    }
}

fn socket_path(value: Vec<u8>) -> Result<PathBuf, UriError> {
    if value.is_empty() {
        return Err(UriError::NoSocket);
    }
    if value.contains(&0) {
        return Err(UriError::Nul("socket path"));
    }
    Ok(PathBuf::from(OsString::from_vec(value)))
}

fn directory(name: &str, value: Vec<u8>) -> Result<PathBuf, UriError> {
    if value.is_empty() || value.contains(&0) {
        return Err(bad_value(name, &value));
    }
    Ok(PathBuf::from(OsString::from_vec(value)))
}

fn tls_kind(name: &str, value: Vec<u8>) -> Result<TlsKind, UriError> {
    match value.as_slice() {
        b"anon" => Ok(TlsKind::Anonymous),
        b"x509" => Ok(TlsKind::X509),
        b"psk" => Ok(TlsKind::PreSharedKey),
        _ => Err(bad_value(name, &value)),
    }
}

fn flag(name: &str, value: Vec<u8>) -> Result<bool, UriError> {
    match value.as_slice() {
        b"0" => Ok(false),
        b"1" => Ok(true),
        _ => Err(bad_value(name, &value)),
    }
}

fn bad_value(name: &str, value: &[u8]) -> UriError {
    UriError::ParameterValue {
        name: name.to_owned(),
        value: String::from_utf8_lossy(value).into_owned(),
    }
}

fn export_name(name: Vec<u8>) -> Result<String, UriError> {
    if name.len() > STRING_LEN_MAX {
        return Err(UriError::ExportNameTooLong(name.len()));
    }
    text(name, "export name")
}

fn text(bytes: Vec<u8>, what: &'static str) -> Result<String, UriError> {
    let text = String::from_utf8(bytes).map_err(|_| UriError::Utf8(what))?;
    if text.contains('\0') { Err(UriError::Nul(what)) } else { Ok(text) }
}

fn decode(text: &str) -> Result<Vec<u8>, UriError> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        let (Some(high), Some(low)) = (digit(), digit()) else { return Err(UriError::Escape) };
        decoded.push((high * 16 + low) as u8);
    }
    Ok(decoded)
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = '?';
        f.write_str(if self.tls.is_some() { "nbds" } else { "nbd" })?;
        match &self.endpoint {
            Endpoint::Tcp { host, port } => {
                f.write_str("://")?;
                if host.contains(':') {
                    f.write_char('[')?;
                    encode(f, host.as_bytes(), b":")?;
                    f.write_char(']')?;
                } else {
                    encode(f, host.as_bytes(), b"")?;
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                f.write_char('/')?;
                encode(f, self.export.as_bytes(), b"/:@")?;
            }
            Endpoint::Unix { path } => {
                f.write_str("+unix:///")?;
                encode(f, self.export.as_bytes(), b"/:@")?;
                write!(f, "{separator}socket=")?;
                encode(f, path.as_os_str().as_bytes(), b"/:@")?;
                separator = '&';
            }
        }
        self.tls.iter().try_for_each(|tls| tls.display(f, separator))
    }
}

impl TlsParameters {
    fn display(&self, f: &mut fmt::Formatter<'_>, mut separator: char) -> fmt::Result {
        let kind = self.kind.map(|kind| match kind {
            TlsKind::Anonymous => "anon",
            TlsKind::X509 => "x509",
            TlsKind::PreSharedKey => "psk",
        });
        let verify = self.verify_peer.map(|verify| if verify { "1" } else { "0" });
        let parameters = [
            ("tls-type", kind.map(str::as_bytes)),
            ("tls-hostname", self.hostname.as_deref().map(str::as_bytes)),
            ("tls-verify-peer", verify.map(str::as_bytes)),
            (
                "tls-certificates",
                self.certificates.as_ref().map(|path| path.as_os_str().as_bytes()),
            ),
        ];
        for (name, value) in parameters {
            if let Some(value) = value {
                write!(f, "{separator}{name}=")?;
                encode(f, value, b"/:")?;
                separator = '&';
            }
        }
        Ok(())
    }
}

/// Percent-encodes all but the characters that a URI leaves alone, and those in `also_plain`.
fn encode(f: &mut fmt::Formatter<'_>, bytes: &[u8], also_plain: &[u8]) -> fmt::Result {
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || also_plain.contains(&byte) {
            f.write_char(char::from(byte))?;
        } else {
            write!(f, "%{byte:02X}")?;
        }
    }
    Ok(())
}
