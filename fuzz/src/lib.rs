#![doc = include_str!("../README.md")]

mod client;
mod pipe;
mod program;
mod server;

pub use client::{nbd_client_handshake, nbd_client_transmission};
pub use server::{nbd_server_handshake, nbd_server_transmission};

/// One target: what it is called, and what it does with any bytes at all.
pub type Target = (&'static str, fn(&[u8]));

/// Every target. A corpus of the same name lies in `corpus`.
pub const TARGETS: [Target; 4] = [
    ("nbd_server_handshake", nbd_server_handshake),
    ("nbd_server_transmission", nbd_server_transmission),
    ("nbd_client_handshake", nbd_client_handshake),
    ("nbd_client_transmission", nbd_client_transmission),
];
