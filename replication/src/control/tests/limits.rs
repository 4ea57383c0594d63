//! What one client may take of the server.
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::{Client, DEADLINE, Server};
use crate::control::ServerLimits;

#[tokio::test]
async fn no_more_than_eight_commands_are_queued_and_then_nothing_is_read() {
    let server = Server::start();
    let mut client = Client::negotiated_oob(&server.path).await;
    client.send(b"{'execute':'hang','id':0}").await;
    tokio::time::timeout(DEADLINE, server.handler.entered.notified()).await.unwrap();
    for id in 1..=7 {
        client.send(format!("{{'execute':'query-status','id':{id}}}").as_bytes()).await;
    }
    let oob = "{'exec-oob':'query-status','id':'oob'}";
    assert_eq!(client.ask(oob).await["id"], "oob", "seven are queued");
    client.send(b"{'execute':'query-status','id':8}").await;
    client.send(oob.as_bytes()).await;
    server.events.emit("TICK", Value::Null);
    assert_eq!(client.message().await["event"], "TICK", "the out-of-band command is not read");
    server.handler.release.notify_one();
    let mut ids = Vec::new();
    for _ in 0..10 {
        ids.push(client.message().await["id"].clone());
    }
    let place = ids.iter().position(|id| id == "oob").unwrap();
    assert!(place > 0, "{ids:?}");
    ids.remove(place);
    assert_eq!(ids, (0..=8).map(Value::from).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_line_that_is_too_long_is_skipped_with_bounded_memory() {
    let server = Server::start();
    let mut client = Client::negotiated(&server.path).await;
    for _ in 0..40 {
        client.send(&[b'x'; 64 << 10]).await;
    }
    let answer = client.ask("").await;
    assert_eq!(answer["error"]["desc"], "message longer than 65536 bytes");
    assert!(client.ask(r#"{"execute":"query-status"}"#).await.get("return").is_some());
}

#[tokio::test]
async fn a_long_command_holds_up_neither_other_clients_nor_events() {
    let server = Server::start();
    let mut slow = Client::negotiated(&server.path).await;
    slow.send(b"{\"execute\":\"hang\",\"id\":1}\n{\"execute\":\"query-status\",\"id\":2}\n").await;
    tokio::time::timeout(DEADLINE, server.handler.entered.notified()).await.unwrap();

    let mut other = Client::negotiated(&server.path).await;
    assert!(other.ask(r#"{"execute":"query-status"}"#).await.get("return").is_some());
    server.events.emit("TICK", Value::Null);
    assert_eq!(slow.message().await["event"], "TICK");

    server.handler.release.notify_one();
    assert_eq!(slow.message().await, json!({ "return": {}, "id": 1 }));
    assert_eq!(slow.message().await["id"], 2);
}

#[tokio::test]
async fn a_client_that_does_not_read_loses_events_first_and_is_told() {
    let server = Server::start();
    let mut client = Client::negotiated(&server.path).await;
    for number in 0..1000 {
        server.events.emit("TICK", json!({ "number": number }));
    }
    let first = client.message().await;
    assert_eq!(first["event"], "EVENTS_LOST");
    let lost = first["data"]["count"].as_u64().unwrap();
    let next = client.message().await;
    assert_eq!(next["data"]["number"], lost);
    assert_eq!(next["sequence"], lost + 1);
    assert!(client.ask(r#"{"execute":"query-status"}"#).await.get("event").is_some());
}

#[tokio::test]
async fn a_client_that_leaves_answers_unread_is_closed_and_others_are_served() {
    let limits =
        ServerLimits { write_timeout: Duration::from_millis(50), ..ServerLimits::default() };
    let server = Server::start_with(limits);
    let mut deaf = Client::negotiated(&server.path).await;
    let flood = async {
        loop {
            if deaf.stream.get_mut().write_all(b"{\"execute\":\"query-commands\"}\n").await.is_err()
            {
                return;
            }
        }
    };
    tokio::time::timeout(DEADLINE, flood).await.expect("the server closes the connection");
    let mut other = Client::negotiated(&server.path).await;
    assert!(other.ask(r#"{"execute":"query-status"}"#).await.get("return").is_some());
}

#[tokio::test]
async fn one_client_too_many_is_told_and_closed() {
    let limits = ServerLimits { clients_max: 2, ..ServerLimits::default() };
    let server = Server::start_with(limits);
    let first = Client::connect(&server.path).await;
    let _second = Client::connect(&server.path).await;
    let mut third =
        Client { stream: BufReader::new(UnixStream::connect(&server.path).await.unwrap()) };
    let refusal = third.message().await;
    assert_eq!(refusal["error"]["desc"], "too many clients on this control socket");
    assert!(third.is_closed().await);
    drop(first);
    let again = async {
        loop {
            let stream = UnixStream::connect(&server.path).await.unwrap();
            let mut client = Client { stream: BufReader::new(stream) };
            if client.message().await.get("QMP").is_some() {
                return;
            }
        }
    };
    tokio::time::timeout(DEADLINE, again).await.expect("a place became free");
}

#[tokio::test]
async fn a_client_that_never_negotiates_is_closed() {
    let limits =
        ServerLimits { negotiation_timeout: Duration::from_millis(20), ..ServerLimits::default() };
    let server = Server::start_with(limits);
    let mut silent = Client::connect(&server.path).await;
    assert!(silent.is_closed().await);
}
