//! Serves a file at an NBD URI, in one thread, until it is interrupted:
//!
//! ```sh
//! cargo run --release -p brep-nbd --example serve -- disk.raw 'nbd+unix:///?socket=/tmp/disk.sock'
//! ```
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use brep_block::{RawFile, RawFileOptions};
use brep_nbd::NbdUri;
use brep_nbd::server::{Export, Server, ServerConfig, StaticExports};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(file), Some(uri)) = (arguments.next(), arguments.next()) else {
        return Err("usage: serve FILE URI".into());
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(&file, &uri.parse()?))
}

async fn serve(file: &str, uri: &NbdUri) -> Result<(), Box<dyn Error>> {
    let device = RawFile::open(file, RawFileOptions::default())?;
    let exports = StaticExports::new();
    exports.add(Export::new(uri.export.clone(), device).multi_conn(true));
    let server = Server::new(Arc::new(exports), ServerConfig::default());
    let listener = Server::bind(&uri.endpoint).await?;
    eprintln!("serving {file} on {}", listener.endpoint());
    tokio::select! {
        () = server.serve(listener) => {}
        result = tokio::signal::ctrl_c() => result?,
    }
    server.shutdown(Duration::from_secs(5)).await;
    Ok(())
}
