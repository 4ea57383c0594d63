//! A client, and what a server may send to it.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use brep_block::{BlockDevice, FlushLevel, Result, WriteFlags, ZeroFlags};
use brep_nbd::client::{ConnectOptions, Connection};
use bytes::Bytes;

use crate::pipe::{self, Other, Pace};
use crate::program;
use crate::server;

/// Until everything that can be sent has been.
const A_MOMENT: Duration = Duration::from_millis(1);

/// Any bytes, from the first that a server sends on; the first says what the client wants.
///
/// # Panics
/// If the client waits for ever, or believes something else when the same bytes arrive in other
/// pieces.
pub fn nbd_client_handshake(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else { return };
    let paces = [Pace::Whole, Pace::Pieces(data.len() as u64 + 1)];
    let [whole, pieces] = paces.map(|pace| {
        let other = Other::sends(data, pace);
        pipe::run(&other, async {
            match pipe::finite(Connection::connect(&options(choice))).await {
                Ok(connection) => format!("{:?}", connection.export()),
                Err(error) => error.to_string(),
            }
        })
    });
    assert_eq!(whole, pieces, "in one piece, and in pieces");
}

/// Any replies after a handshake; the first byte says how it was.
///
/// # Panics
/// If a request never ends, a read returns another length than was asked for, or the results
/// differ when the same bytes arrive in other pieces.
pub fn nbd_client_transmission(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else { return };
    let whole = converse(choice, data, Pace::Whole);
    let pieces = converse(choice, data, Pace::Pieces(data.len() as u64 + 1));
    assert_eq!(whole, pieces, "in one piece, and in pieces");
}

fn options(choice: u8) -> ConnectOptions {
    let mut options = ConnectOptions::new(pipe::endpoint(), "disk");
    options.mode_max = server::mode(choice);
    options
}

/// What became of a few requests at a time.
fn converse(choice: u8, data: &[u8], pace: Pace) -> Vec<String> {
    let other = Other::shakes_hands(pace);
    pipe::run(&other, async {
        let disk = Connection::connect(&options(choice)).await.expect("a server of ours");
        // A request is sent by the call; waiting for one after the other hides nothing.
        let mut waiting = Vec::<Waiting<'_>>::new();
        for (offset, len) in [(0, 512), (4096, 8192)] {
            let read = disk.read(offset, len);
            waiting.push(Box::pin(async move { read.await.map(|data| show(&data, len)) }));
        }
        let write = disk.write(512, Bytes::from_static(&[7; 512]), WriteFlags { fua: true });
        waiting.push(Box::pin(done(write)));
        waiting.push(Box::pin(done(disk.write_zeroes(0, 65536, ZeroFlags::default()))));
        waiting.push(Box::pin(done(disk.discard(8192, 4096))));
        waiting.push(Box::pin(done(disk.flush(FlushLevel::Durable))));
        let status = disk.block_status(0, 65536);
        waiting.push(Box::pin(async move { status.await.map(|status| format!("{status:?}")) }));
        tokio::time::sleep(A_MOMENT).await;
        other.send(&program::replies(data, &program::requests(&other.received())));
        let mut results = Vec::new();
        for operation in waiting {
            let result = pipe::finite(operation).await;
            results.push(result.unwrap_or_else(|error| error.to_string()));
        }
        results
    })
}

type Waiting<'a> = Pin<Box<dyn Future<Output = Result<String>> + 'a>>;

async fn done(operation: impl Future<Output = Result<()>>) -> Result<String> {
    operation.await.map(|()| String::new())
}

fn show(data: &Bytes, len: usize) -> String {
    assert_eq!(data.len(), len, "a read of another length");
    let sum = data.iter().fold(0_u64, |sum, byte| sum.wrapping_mul(31) + u64::from(*byte));
    format!("{sum:x}")
}
