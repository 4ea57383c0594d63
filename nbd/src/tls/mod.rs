//! TLS with X.509 certificates, as the option `STARTTLS` begins it.
//!
//! Both sides always show a certificate and always check the other's: against one certificate
//! authority, and on the client also against the server's name. Certificates and keys come from a
//! directory in the layout that QEMU and libnbd use:
//!
//! | file | what | needed by |
//! |---|---|---|
//! | `ca-cert.pem` | the authorities that are trusted | both |
//! | `ca-crl.pem` | certificates that are revoked | both, if it is there |
//! | `server-cert.pem`, `server-key.pem` | the server's certificate (its chain), and its key | server |
//! | `client-cert.pem`, `client-key.pem` | the client's | client; without them it shows none |
//!
//! Files that have changed are read again for the next connection; if that fails, what there was
//! stays in use.
//!
//! TLS 1.2 and 1.3 are spoken; neither anonymous TLS nor pre-shared keys.

mod client;
mod directory;
mod reload;
mod server;
mod stream;
mod subject;

pub use client::TlsClient;
pub use directory::TlsError;
pub use server::TlsServer;
pub use stream::{TlsPeer, TlsStream};
