//! `brep tls`: a small certificate authority.
use std::fs::{DirBuilder, OpenOptions};
use std::io::{ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
    date_time_ymd,
};
use sha2::{Digest, Sha256};

use crate::args::{DEFAULT_DAYS, InitArgs, IssueArgs};
use crate::exit::{Failure, OK, Outcome, REFUSED};
use crate::output;

const CA_CERT: &str = "ca-cert.pem";
const CA_KEY: &str = "ca-key.pem";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// The authority lives longer than anything it issues.
const CA_DAYS: u32 = 7300;
/// Clocks of other hosts may be a little behind.
const BACKDATED: Duration = DAY;

/// Makes an authority, and certificates for the hosts that are named.
pub(crate) fn init(args: &InitArgs) -> Outcome {
    let key = KeyPair::generate().map_err(Failure::failed)?;
    // Two authorities with one name would be taken for each other.
    let id = Sha256::digest(key.subject_public_key_info());
    let id: String = id[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    let mut params = parameters(&format!("brep authority {id}"), CA_DAYS);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority = CertifiedIssuer::self_signed(params, key).map_err(Failure::failed)?;

    let made = make_directory(&args.dir);
    if made.as_ref().is_err_and(|error| error.kind() != ErrorKind::AlreadyExists) {
        made.with_context(|| format!("cannot make {}", args.dir.display()))?;
    }
    if args.dir.join(CA_CERT).exists() {
        return Err(Failure::new(
            REFUSED,
            format!(
                "{} has an authority already, and nothing is overwritten; `brep tls issue` issues \
                 further certificates",
                args.dir.display()
            ),
        ));
    }
    // Without its key the certificate is of no use, so it comes last.
    write_new(&args.dir.join(CA_KEY), &authority.key().serialize_pem(), 0o600)?;
    write_new(&args.dir.join(CA_CERT), &authority.pem(), 0o644)?;
    output::line(&format!("{}: authority, valid for {CA_DAYS} days", args.dir.display()))?;
    for host in &args.hosts {
        issue(&IssueArgs {
            dir: args.dir.clone(),
            name: host.clone(),
            hosts: Vec::new(),
            client: false,
            out: None,
            days: DEFAULT_DAYS,
        })?;
    }
    Ok(OK)
}

/// Issues certificates into a new directory.
pub(crate) fn issue(args: &IssueArgs) -> Outcome {
    let authority = Authority::open(&args.dir)?;
    let server = match args.client {
        true => None,
        false => Some(server_parameters(args)?),
    };
    let out = args.out.clone().unwrap_or_else(|| args.dir.join(&args.name));
    make_directory(&out).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => Failure::new(
            REFUSED,
            format!("{} exists, and nothing is overwritten: --out names another", out.display()),
        ),
        _ => Failure::failed(format!("cannot make {}: {error}", out.display())),
    })?;
    let issued = authority.issue_into(&out, server, client_parameters(args));
    if issued.is_err() {
        // Ours, and of no use to anybody.
        let _ = std::fs::remove_dir_all(&out);
    }
    issued?;
    let roles = if args.client { "client" } else { "server and client" };
    let (out, days) = (out.display(), args.days);
    output::line(&format!("{out}: {roles} certificates, CN={}, valid for {days} days", args.name))?;
    Ok(OK)
}

/// An authority that can issue.
struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn open(dir: &Path) -> Result<Self, Failure> {
        let read = |file: &str| {
            let path: PathBuf = dir.join(file);
            std::fs::read_to_string(&path).with_context(|| {
                format!("cannot read {} (`brep tls init` makes an authority)", path.display())
            })
        };
        let (certificate, key) = (read(CA_CERT)?, read(CA_KEY)?);
        let unusable = |error| Failure::failed(format!("{}: {error}", dir.display()));
        let key = KeyPair::from_pem(&key).map_err(unusable)?;
        let issuer = Issuer::from_ca_cert_pem(&certificate, key).map_err(unusable)?;
        Ok(Authority { certificate, issuer })
    }

    fn issue_into(
        &self,
        out: &Path,
        server: Option<CertificateParams>,
        client: CertificateParams,
    ) -> Result<(), Failure> {
        write_new(&out.join(CA_CERT), &self.certificate, 0o644)?;
        let roles = [("server", server), ("client", Some(client))];
        for (role, params) in roles.into_iter().filter_map(|(role, p)| Some((role, p?))) {
            let key = KeyPair::generate().map_err(Failure::failed)?;
            let certificate = params.signed_by(&key, &self.issuer).map_err(Failure::failed)?;
            write_new(&out.join(format!("{role}-key.pem")), &key.serialize_pem(), 0o600)?;
            write_new(&out.join(format!("{role}-cert.pem")), &certificate.pem(), 0o644)?;
        }
        Ok(())
    }
}

fn server_parameters(args: &IssueArgs) -> Result<CertificateParams, Failure> {
    let mut params = leaf_parameters(args, ExtendedKeyUsagePurpose::ServerAuth);
    // A name that can be no host's is no mistake: the host may be given apart.
    params.subject_alt_names.extend(alternative_name(&args.name));
    for host in &args.hosts {
        let name = alternative_name(host).ok_or_else(|| {
            Failure::usage(format!("--host {host}: neither a host name nor an IP address"))
        })?;
        params.subject_alt_names.push(name);
    }
    // So that a tunnel, a unix socket and a test on the host itself work.
    params.subject_alt_names.extend(alternative_name("localhost"));
    params.subject_alt_names.push(SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)));
    params.subject_alt_names.push(SanType::IpAddress(IpAddr::V6(Ipv6Addr::LOCALHOST)));
    Ok(params)
}

fn client_parameters(args: &IssueArgs) -> CertificateParams {
    leaf_parameters(args, ExtendedKeyUsagePurpose::ClientAuth)
}

fn leaf_parameters(args: &IssueArgs, usage: ExtendedKeyUsagePurpose) -> CertificateParams {
    let mut params = parameters(&args.name, args.days);
    // QEMU wants both, whatever the kind of the key is.
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    params
}

fn parameters(common_name: &str, days: u32) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now = date_time_ymd(1970, 1, 1) + now;
    params.not_before = now - BACKDATED;
    params.not_after = now + DAY * days;
    params
}

fn alternative_name(host: &str) -> Option<SanType> {
    if let Ok(address) = host.parse() {
        return Some(SanType::IpAddress(address));
    }
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if !host.split('.').all(label) {
        return None;
    }
    host.try_into().ok().map(SanType::DnsName)
}

fn make_directory(path: &Path) -> std::io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

/// Writes a file that must not be there yet; others never see it with another mode.
fn write_new(path: &Path, contents: &str, mode: u32) -> Result<(), Failure> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| {
        file.write_all(contents.as_bytes())?;
        file.sync_all()
    })
    .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}
