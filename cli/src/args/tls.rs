use std::path::PathBuf;

use clap::{Args, Subcommand};

/// How long certificates of hosts are valid unless something else is said.
pub(crate) const DEFAULT_DAYS: u32 = 825;

/// Make the certificates that TLS needs
#[derive(Debug, Args)]
pub(crate) struct TlsArgs {
    #[command(subcommand)]
    pub(crate) command: TlsCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TlsCommand {
    Init(InitArgs),
    Issue(IssueArgs),
}

/// Make a certificate authority, and certificates for hosts
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  brep tls init pki alpha beta
  scp -r pki/beta beta:/etc/brep/tls

The directory of each host, and nothing else, goes to that host. DIR/ca-key.pem stays where it is:
whoever has it makes certificates.")]
pub(crate) struct InitArgs {
    /// Directory of the authority; made with mode 0700
    pub(crate) dir: PathBuf,

    /// Hosts to issue certificates for, as `brep tls issue` does
    #[arg(value_name = "HOST", value_parser = parse_name)]
    pub(crate) hosts: Vec<String>,
}

/// Issue a host's certificates into a directory of its own
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  brep tls issue pki beta --host beta.example.org --host 10.0.0.2
  brep tls issue pki guest7 --client

The files are called as QEMU and libnbd expect them: ca-cert.pem, server-cert.pem, server-key.pem,
client-cert.pem and client-key.pem.")]
pub(crate) struct IssueArgs {
    /// Directory of the authority
    pub(crate) dir: PathBuf,

    /// Whom they are for: the subject is CN=NAME, and the server may be reached under this name
    #[arg(value_parser = parse_name)]
    pub(crate) name: String,

    /// Another host name or IP address under which the server is reached
    #[arg(long = "host", value_name = "HOST", conflicts_with = "client")]
    pub(crate) hosts: Vec<String>,

    /// A client's certificate only
    #[arg(long)]
    pub(crate) client: bool,

    /// Where to put them, a new directory [default: DIR/NAME]
    #[arg(long, value_name = "NEW-DIR")]
    pub(crate) out: Option<PathBuf>,

    /// How long they are valid
    #[arg(long, default_value_t = DEFAULT_DAYS, value_parser = clap::value_parser!(u32).range(1..=7300))]
    pub(crate) days: u32,
}

/// A name that can be a subject and the name of a directory.
fn parse_name(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    if (1..=64).contains(&text.len()) && text.bytes().all(plain) && !text.starts_with(['.', '-']) {
        return Ok(text.to_owned());
    }
    Err("1 to 64 letters, digits, dots, dashes, underscores and colons, not first a dot".into())
}
