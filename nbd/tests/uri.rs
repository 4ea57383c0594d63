//! NBD URIs: what is accepted, what it means, and what is refused with which reason.

use brep_nbd::{Endpoint, NbdUri, TlsKind, UriError};
use proptest::prelude::*;

fn tcp(host: &str, port: u16) -> Endpoint {
    Endpoint::Tcp { host: host.to_owned(), port }
}

fn unix(path: &str) -> Endpoint {
    Endpoint::Unix { path: path.into() }
}

#[test]
fn accepted_uris_mean_what_the_scheme_says() {
    let table = [
        ("nbd://host", tcp("host", 10809), "", false),
        ("nbd://host/", tcp("host", 10809), "", false),
        ("nbd://host/disk", tcp("host", 10809), "disk", false),
        ("nbd://host//disk", tcp("host", 10809), "/disk", false),
        ("nbd://host/a/b", tcp("host", 10809), "a/b", false),
        ("nbd://host/a%2Fb%20c", tcp("host", 10809), "a/b c", false),
        ("nbd://host/%C3%A9", tcp("host", 10809), "é", false),
        ("nbd://host:1/x", tcp("host", 1), "x", false),
        ("nbd://host:/x", tcp("host", 10809), "x", false),
        ("NBD://host/x", tcp("host", 10809), "x", false),
        ("nbd+tcp://127.0.0.1:65535", tcp("127.0.0.1", 65535), "", false),
        ("nbd://[::1]", tcp("::1", 10809), "", false),
        ("nbd://[2001:db8::1]:9/x", tcp("2001:db8::1", 9), "x", false),
        ("nbd://[fe80::1%25eth0]/", tcp("fe80::1%eth0", 10809), "", false),
        ("nbds://host/x", tcp("host", 10809), "x", true),
        ("nbd+unix:///?socket=/run/s", unix("/run/s"), "", false),
        ("nbd+unix:///disk?socket=s.sock", unix("s.sock"), "disk", false),
        ("nbd+unix:////disk?socket=%2Frun%2Fa%20b", unix("/run/a b"), "/disk", false),
        ("nbd+unix://?socket=s", unix("s"), "", false),
        ("nbds+unix:///x?socket=s", unix("s"), "x", true),
        ("nbd:host:10810", tcp("host", 10810), "", false),
        ("nbd:host:10810:exportname=a/b%20c", tcp("host", 10810), "a/b%20c", false),
        ("nbd:[::1]:10810:exportname=a", tcp("::1", 10810), "a", false),
        ("nbd:unix:/run/s", unix("/run/s"), "", false),
        ("nbd:unix:/run/a:b:exportname=c:d", unix("/run/a:b"), "c:d", false),
    ];
    for (text, endpoint, export, tls) in table {
        let uri: NbdUri = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(uri.endpoint, endpoint, "{text}");
        assert_eq!(uri.export, export, "{text}");
        assert_eq!(uri.tls.is_some(), tls, "{text}");
        let shown = uri.to_string();
        assert_eq!(shown.parse().as_ref(), Ok(&uri), "{text} was displayed as {shown}");
    }
}

#[test]
fn refused_uris_are_refused_with_the_reason() {
    let table = [
        ("", UriError::Scheme),
        ("/dev/sda", UriError::Scheme),
        ("http://host/", UriError::Scheme),
        ("nbd+udp://host/", UriError::Scheme),
        ("nbd", UriError::Scheme),
        ("nbd://", UriError::NoHost),
        ("nbd:///disk", UriError::NoHost),
        ("nbd://:10809/", UriError::NoHost),
        ("nbd://[]/", UriError::NoHost),
        ("nbd://::1/", UriError::Host("::1".into())),
        ("nbd://[::1/", UriError::Host("[::1".into())),
        ("nbd://[::1]9/", UriError::Host("[::1]9".into())),
        ("nbd://host:65536/", UriError::Port("65536".into())),
        ("nbd://host:-1/", UriError::Port("-1".into())),
        ("nbd://host:+1/", UriError::Port("+1".into())),
        ("nbd://host:ssh/", UriError::Port("ssh".into())),
        ("nbd://me@host/", UriError::UserInfo),
        ("nbd://host/x#y", UriError::Fragment),
        ("nbd://host/%", UriError::Escape),
        ("nbd://host/%4", UriError::Escape),
        ("nbd://host/%zz", UriError::Escape),
        ("nbd://host/%+1", UriError::Escape),
        ("nbd://host/%00", UriError::Nul("export name")),
        ("nbd://host/%ff", UriError::Utf8("export name")),
        ("nbd+unix:///x", UriError::NoSocket),
        ("nbd+unix:///x?socket=", UriError::NoSocket),
        ("nbd+unix:///x?socket=%00", UriError::Nul("socket path")),
        ("nbd+unix://host/x?socket=s", UriError::Authority),
        ("nbd+unix:///x?socket=s&socket=t", UriError::RepeatedParameter("socket".into())),
        ("nbd+unix:///x?socket=s&colour=red", UriError::UnknownParameter("colour".into())),
        ("nbd://host/x?x-y", UriError::UnknownParameter("x-y".into())),
        ("nbd://host/x?socket=s", UriError::MisplacedParameter("socket".into(), "unix sockets")),
        (
            "nbd://host/x?tls-type=x509",
            UriError::MisplacedParameter("tls-type".into(), "nbds schemes"),
        ),
        (
            "nbds://host/x?tls-type=ssl",
            UriError::ParameterValue { name: "tls-type".into(), value: "ssl".into() },
        ),
        ("nbd:host", UriError::Port(String::new())),
        ("nbd:host:x", UriError::Port("x".into())),
        ("nbd::10809", UriError::NoHost),
        ("nbd:unix:", UriError::NoSocket),
    ];
    for (text, reason) in table {
        assert_eq!(text.parse::<NbdUri>(), Err(reason), "{text:?}");
    }
}

#[test]
fn an_export_name_longer_than_the_protocol_allows_is_refused() {
    let longest = format!("nbd://host/{}", "x".repeat(4096));
    assert_eq!(longest.parse::<NbdUri>().map(|uri| uri.export.len()), Ok(4096));
    assert_eq!(format!("{longest}x").parse::<NbdUri>(), Err(UriError::ExportNameTooLong(4097)));
}

#[test]
fn tls_parameters_are_kept() {
    let text = "nbds://host/x?tls-type=psk&tls-hostname=a.b&tls-verify-peer=0";
    let uri: NbdUri = text.parse().expect("a good URI");
    let tls = uri.tls.as_ref().expect("TLS is demanded");
    assert_eq!(tls.kind, Some(TlsKind::PreSharedKey));
    assert_eq!(tls.hostname.as_deref(), Some("a.b"));
    assert_eq!(tls.verify_peer, Some(false));
    assert_eq!(uri.to_string(), text);
}

#[test]
fn only_what_cannot_be_reached_from_outside_counts_as_loopback() {
    for host in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "localhost", "LocalHost"] {
        assert!(tcp(host, 1).is_loopback(), "{host}");
    }
    for host in ["0.0.0.0", "::", "10.0.0.1", "localhost.example", "127.0.0.1.example", "", "127.1"]
    {
        assert!(!tcp(host, 1).is_loopback(), "{host}");
    }
    assert!(unix("/run/s").is_loopback());
}

proptest! {
    #[test]
    fn every_name_and_path_survives_being_displayed_and_parsed(
        export in "[^\0]{0,40}",
        path in "[^\0]{1,40}",
        port in 1u16..,
    ) {
        let over_unix = NbdUri { endpoint: unix(&path), export: export.clone(), tls: None };
        prop_assert_eq!(over_unix.to_string().parse(), Ok(over_unix));
        let over_tcp = NbdUri { endpoint: tcp("::1", port), export, tls: None };
        prop_assert_eq!(over_tcp.to_string().parse(), Ok(over_tcp));
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "(nbd(s|\\+unix)?:/{0,3})?.{0,60}") {
        let _ = text.parse::<NbdUri>();
    }
}
