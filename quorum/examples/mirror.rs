//! A mirror over files and NBD servers, which is itself an NBD server.
//!
//! ```sh
//! truncate -s 1G a.raw b.raw
//! cargo run --release -p brep-quorum --example mirror -- \
//!     --listen 'nbd+unix:///?socket=mirror.sock' \
//!     -o vote-threshold=2,rewrite-corrupted=on a.raw b.raw nbd://backup:10809/vda
//! ```
//!
//! The three must hold the same bytes to begin with; nothing compares them at the start. Every
//! write goes to all of them; it fails unless two succeed. A read is what two agree on; with
//! `rewrite-corrupted` the third is repaired. A child that has failed is out of date and stays
//! so: take it out, copy the disk to it while nobody writes, add it again. That is why a server
//! that was lost is never connected to again by itself.
//!
//! `-o` takes what `brep_quorum::option_text` describes. A child's own options are `filename`
//! (a file or a URI; what stands behind the options means the same), `node-name` (by default
//! the file name) and `ignore-errors`.
//!
//! Events come on stdout, one JSON object in a line. Commands are read from stdin in the same
//! way, and answered on stdout:
//!
//! ```text
//! {"execute": "query-children"}
//! {"execute": "x-blockdev-change", "arguments": {"parent": "mirror", "child": "children.2"}}
//! {"execute": "blockdev-del", "arguments": {"node-name": "nbd://backup:10809/vda"}}
//! {"execute": "blockdev-add", "arguments": {"node-name": "new", "filename": "c.raw"}}
//! {"execute": "x-blockdev-change", "arguments": {"parent": "mirror", "node": "new"}}
//! {"execute": "quit"}
//! ```
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use brep_block::{BlockDevice, FlushLevel, RawFile, RawFileOptions};
use brep_nbd::NbdUri;
use brep_nbd::client::{ConnectOptions, Connection};
use brep_nbd::server::{Export, Server, ServerConfig, StaticExports};
use brep_quorum::option_text::{ChildSource, ChildText, QuorumText};
use brep_quorum::{Child, ChildChange, Quorum, QuorumError, QuorumEvent, QuorumOptions};
use clap::Parser;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

type Error = Box<dyn std::error::Error>;
type Device = Arc<dyn BlockDevice>;
type Nodes = BTreeMap<String, Device>;

/// Serves several files and NBD exports of the same content as one disk.
#[derive(Parser)]
struct Args {
    /// Where to serve the mirror, an NBD URI
    #[arg(long, value_name = "URI")]
    listen: NbdUri,
    /// Options of the quorum, for example vote-threshold=2,rewrite-corrupted=on
    #[arg(short, long, value_name = "KEY=VALUE,...", default_value = "")]
    options: String,
    /// The mirror's node name
    #[arg(long, default_value = "mirror")]
    node_name: String,
    /// The children: files and NBD URIs
    #[arg(value_name = "FILE|URI")]
    children: Vec<String>,
}

fn main() -> ExitCode {
    match start(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mirror: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: Args) -> Result<(), Error> {
    // A thread of its own, so that nobody who is slow to read holds up the disk.
    let (output, lines) = sync_channel::<Value>(1000);
    let printer = std::thread::spawn(move || lines.iter().for_each(|line| println!("{line}")));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(run(args, output));
    // With its tasks go the last who could print.
    drop(runtime);
    printer.join().map_err(|_| "standard output was closed")?;
    result
}

async fn run(args: Args, output: SyncSender<Value>) -> Result<(), Error> {
    let mut options = split_options(&args.options)?;
    let files = args.children.into_iter().enumerate();
    options.extend(files.map(|(i, file)| (format!("children.{i}.filename"), file)));
    let mirror = Mirror::open(&args.node_name, &options, output).await?;

    let exports = StaticExports::new();
    // A flush reaches every child, whichever client asks for it.
    exports.add(Export::new(args.listen.export, mirror.quorum.clone()).multi_conn(true));
    let server = Server::new(Arc::new(exports), ServerConfig::default());
    let listener = Server::bind(&args.listen.endpoint).await?;
    eprintln!("serving {} on {}", args.node_name, listener.endpoint());

    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        () = server.serve(listener) => {}
        () = mirror.take_commands(commands()) => {}
        _ = terminate.recv() => {}
        result = tokio::signal::ctrl_c() => result?,
    }
    server.shutdown(Duration::from_secs(5)).await;
    Ok(mirror.quorum.flush(FlushLevel::Durable).await?)
}

/// `key=value,key=value`; two commas stand for one in a value.
fn split_options(text: &str) -> Result<Vec<(String, String)>, Error> {
    let text = text.replace(",,", "\0");
    let pairs = text.split(',').filter(|pair| !pair.is_empty());
    let split = pairs.map(|pair| {
        let pair = pair.replace('\0', ",");
        let (key, value) = pair.split_once('=').ok_or(format!("{pair:?} is no KEY=VALUE"))?;
        Ok((key.to_owned(), value.to_owned()))
    });
    split.collect()
}

/// The lines of stdin. A thread waits for them: a read of a terminal cannot be given up.
fn commands() -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

struct Mirror {
    quorum: Arc<Quorum>,
    /// Everything that was opened, children or not.
    nodes: RefCell<Nodes>,
    output: SyncSender<Value>,
}

impl Mirror {
    async fn open(
        name: &str,
        options: &[(String, String)],
        output: SyncSender<Value>,
    ) -> Result<Self, Error> {
        let text = QuorumText::parse(options)?;
        if let Some((key, _)) = text.rest.first() {
            return Err(format!("a quorum has no option {key:?}").into());
        }
        let mut nodes = Nodes::new();
        let mut children = Vec::new();
        for ChildText { source, ignore_errors } in text.children {
            let device = match source {
                ChildSource::Reference(node) => {
                    nodes.get(&node).cloned().ok_or(QuorumError::NoSuchNode(node))?
                }
                ChildSource::Inline(options) => {
                    let device = open_described(&options).await?;
                    add_node(&mut nodes, &device)?;
                    device
                }
            };
            children.push(Child { device, ignore_errors });
        }
        let events = output.clone();
        let options = QuorumOptions::new(name, 1, children).settings(text.settings).events(
            // Whoever does not read misses events; at most a few come in a second.
            move |event: QuorumEvent| drop(events.try_send(describe(&event))),
        );
        let quorum = Quorum::new(options)?;
        Ok(Mirror { quorum, nodes: RefCell::new(nodes), output })
    }

    /// Answers commands until one is `quit`; without commands it goes on for ever.
    async fn take_commands(&self, mut lines: mpsc::Receiver<String>) {
        while let Some(line) = lines.recv().await {
            let request = serde_json::from_str(&line).unwrap_or(Value::Null);
            let mut answer = match self.execute(&request).await {
                Ok(value) => json!({ "return": value }),
                Err(error) => {
                    json!({ "error": { "class": "GenericError", "desc": error.to_string() } })
                }
            };
            if let Some(id) = request.get("id") {
                answer["id"] = id.clone();
            }
            if self.output.send(answer).is_err() || request["execute"] == "quit" {
                return;
            }
        }
        std::future::pending().await
    }

    async fn execute(&self, request: &Value) -> Result<Value, Error> {
        let argument = |name: &str| request["arguments"][name].as_str().map(str::to_owned);
        let needed = |name| argument(name).ok_or(format!("Parameter '{name}' is missing"));
        let command = request["execute"].as_str().ok_or("a command is {\"execute\": NAME}")?;
        match command {
            "quit" => Ok(json!({})),
            "query-children" => {
                let children = self.quorum.children().into_iter();
                Ok(children.map(|(child, node)| json!({"child": child, "node": node})).collect())
            }
            "blockdev-add" => {
                let (name, file) = (needed("node-name")?, needed("filename")?);
                let device = open_device(&name, &file).await?;
                add_node(&mut self.nodes.borrow_mut(), &device)?;
                Ok(json!({}))
            }
            "blockdev-del" => {
                let node = needed("node-name")?;
                if self.quorum.children().iter().any(|(_, name)| *name == node) {
                    return Err(format!("Node {node} is in use").into());
                }
                let removed = self.nodes.borrow_mut().remove(&node);
                removed.map(|_| json!({})).ok_or(QuorumError::NoSuchNode(node).into())
            }
            "x-blockdev-change" => {
                let change = ChildChange::new(argument("child"), argument("node"))?;
                self.change(&needed("parent")?, change).await
            }
            _ => Err(format!("The command {command} has not been found").into()),
        }
    }

    async fn change(&self, parent: &str, change: ChildChange) -> Result<Value, Error> {
        if parent != self.quorum.name() {
            return Err(match self.nodes.borrow().contains_key(parent) {
                true => change.refused_by(parent).into(),
                false => QuorumError::NoSuchParent(parent.to_owned()).into(),
            });
        }
        match change {
            ChildChange::Add { node } => {
                let device = self.nodes.borrow().get(&node).cloned();
                let device = device.ok_or(QuorumError::NoSuchNode(node))?;
                self.quorum.add_child(Child::new(device)).await?;
            }
            ChildChange::Remove { child } => {
                self.quorum.remove_child(&child).await?;
            }
        }
        Ok(json!({}))
    }
}

fn add_node(nodes: &mut Nodes, device: &Device) -> Result<(), Error> {
    if nodes.contains_key(device.name()) {
        return Err(format!("Duplicate nodes with node-name='{}'", device.name()).into());
    }
    nodes.insert(device.name().to_owned(), Arc::clone(device));
    Ok(())
}

/// Opens a child by its own options.
async fn open_described(options: &[(String, String)]) -> Result<Device, Error> {
    let (mut file, mut name) = (None, None);
    for (key, value) in options {
        match key.as_str() {
            "filename" => file = Some(value),
            "node-name" => name = Some(value),
            _ => return Err(format!("a child has no option {key:?}").into()),
        }
    }
    let file = file.ok_or("a child needs a filename")?;
    open_device(name.unwrap_or(file), file).await
}

/// Opens a file or connects to a server.
async fn open_device(name: &str, file: &str) -> Result<Device, Error> {
    if !file.contains("://") {
        let options = RawFileOptions { name: Some(name.to_owned()), ..RawFileOptions::default() };
        return Ok(RawFile::open(file, options)?);
    }
    let uri: NbdUri = file.parse()?;
    let mut options = ConnectOptions::from_uri(&uri)?;
    options.name = name.to_owned();
    let connection = Connection::connect(&options).await;
    Ok(connection.map_err(|error| format!("{file}: {error}"))?)
}

fn describe(event: &QuorumEvent) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (name, data) = match event {
        QuorumEvent::ReportBad { operation, error, node_name, sector_num, sectors_count } => {
            let mut data = json!({
                "type": operation.to_string(),
                "node-name": node_name,
                "sector-num": sector_num,
                "sectors-count": sectors_count,
            });
            if let Some(error) = error {
                data["error"] = error.as_str().into();
            }
            ("QUORUM_REPORT_BAD", data)
        }
        QuorumEvent::Failure { reference, sector_num, sectors_count } => {
            let data = json!({
                "reference": reference,
                "sector-num": sector_num,
                "sectors-count": sectors_count,
            });
            ("QUORUM_FAILURE", data)
        }
    };
    let timestamp = json!({ "seconds": now.as_secs(), "microseconds": now.subsec_micros() });
    json!({ "event": name, "data": data, "timestamp": timestamp })
}
