//! Names in certificates as text (RFC 4514).

use std::fmt::Write;

use rustls::pki_types::CertificateDer;
use x509_parser::parse_x509_certificate;
use x509_parser::x509::AttributeTypeAndValue;

/// Attributes that have a short name (RFC 4514, section 3), by object identifier.
const SHORT_NAMES: [(&str, &str); 9] = [
    ("2.5.4.3", "CN"),
    ("2.5.4.7", "L"),
    ("2.5.4.8", "ST"),
    ("2.5.4.10", "O"),
    ("2.5.4.11", "OU"),
    ("2.5.4.6", "C"),
    ("2.5.4.9", "STREET"),
    ("0.9.2342.19200300.100.1.25", "DC"),
    ("0.9.2342.19200300.100.1.1", "UID"),
];

/// The subject of a certificate; none if it is malformed. Different subjects have different texts.
pub(super) fn subject(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = parse_x509_certificate(certificate).ok()?;
    let mut names: Vec<String> = certificate
        .subject()
        .iter_rdn()
        .map(|name| name.iter().map(attribute).collect::<Vec<_>>().join("+"))
        .collect();
    // The text begins with what the certificate has last.
    names.reverse();
    Some(names.join(","))
}

fn attribute(attribute: &AttributeTypeAndValue<'_>) -> String {
    let kind = attribute.attr_type().to_id_string();
    let short = SHORT_NAMES.iter().find(|(id, _)| *id == kind);
    let kind = short.map_or(kind.as_str(), |(_, name)| name);
    match attribute.as_str() {
        Ok(text) => format!("{kind}={}", escaped(text)),
        Err(_) => {
            let bytes = attribute.attr_value().data;
            let hex = bytes.iter().fold(String::new(), |mut hex, byte| {
                // Writing to a string cannot fail.
                let _ = write!(hex, "{byte:02x}");
                hex
            });
            format!("{kind}=#{hex}")
        }
    }
}

fn escaped(text: &str) -> String {
    let last = text.chars().count().saturating_sub(1);
    let mut escaped = String::with_capacity(text.len());
    for (index, character) in text.chars().enumerate() {
        let at_edge =
            (index == 0 && matches!(character, ' ' | '#')) || (index == last && character == ' ');
        if character.is_control() {
            let mut bytes = [0; 4];
            for byte in character.encode_utf8(&mut bytes).bytes() {
                let _ = write!(escaped, "\\{byte:02x}");
            }
            continue;
        }
        if at_edge || matches!(character, '"' | '+' | ',' | ';' | '<' | '>' | '\\') {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    fn subject_of(parts: &[(DnType, &str)]) -> String {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for (kind, value) in parts {
            params.distinguished_name.push(kind.clone(), *value);
        }
        let key = KeyPair::generate().unwrap();
        subject(params.self_signed(&key).unwrap().der()).unwrap()
    }

    #[test]
    fn a_subject_is_written_from_its_end() {
        let subject = subject_of(&[
            (DnType::CountryName, "DE"),
            (DnType::OrganizationName, "Example"),
            (DnType::CommonName, "alpha"),
        ]);
        assert_eq!(subject, "CN=alpha,O=Example,C=DE");
    }

    #[test]
    fn a_name_cannot_pretend_to_be_two() {
        assert_eq!(subject_of(&[(DnType::CommonName, "a,O=b")]), "CN=a\\,O=b");
        assert_eq!(subject_of(&[(DnType::CommonName, "a+CN=b\\")]), "CN=a\\+CN=b\\\\");
        assert_eq!(subject_of(&[(DnType::CommonName, "#a ")]), "CN=\\#a\\ ");
        assert_eq!(subject_of(&[(DnType::CommonName, "a\nb\0")]), "CN=a\\0ab\\00");
        assert_eq!(subject_of(&[]), "");
    }

    #[test]
    fn what_is_no_certificate_has_no_subject() {
        for bytes in [&b""[..], b"\x30", b"\x30\x82\xff\xff", &[0x30; 64]] {
            assert_eq!(subject(&CertificateDer::from(bytes)), None);
        }
    }
}
