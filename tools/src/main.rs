//! The crxfer command.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use crxfer::transfer::{Event, Events, ReceiveOptions, Receiver, SendOptions, Target, send};
use crxfer::transport::{Identity, Options};
use crxfer::wire::Layout;

#[derive(Debug, Parser)]
#[command(name = "crxfer", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Recv {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long, default_value = "[::]:0")]
        listen: std::net::SocketAddr,
        #[arg(long)]
        ticket_file: Option<PathBuf>,
        #[arg(long)]
        once: bool,
        #[arg(long, default_value = "faithful")]
        layout: String,
        #[arg(long)]
        json: bool,
    },
    Send {
        dir: PathBuf,
        #[arg(long)]
        to: String,
        #[arg(long)]
        name: Option<String>,
        #[arg(long)]
        base: Option<String>,
        #[arg(long)]
        bwlimit: Option<u64>,
        #[arg(long)]
        json: bool,
    },
}

#[tokio::main]
async fn main() {
    let cli = Cli::parse();
    if let Err(error) = run(cli).await {
        eprintln!("crxfer: {error}");
        std::process::exit(1);
    }
}

async fn run(cli: Cli) -> Result<(), Box<dyn std::error::Error>> {
    match cli.command {
        Command::Recv {
            dir,
            listen,
            ticket_file,
            once,
            layout,
            ..
        } => {
            let receiver = Receiver::bind(ReceiveOptions {
                directory: dir,
                listen: vec![listen],
                layout: match layout.as_str() {
                    "incremental" => Layout::Incremental,
                    "flat" => Layout::Flat,
                    _ => Layout::Faithful,
                },
                max_set_bytes: None,
                keep: 0,
                identity: None,
                peers: Vec::new(),
                transport: Options::default(),
                events: Events::new(|event| match event {
                    Event::Progress { .. } => {}
                    other => eprintln!("{other:?}"),
                }),
            })?;
            let ticket = receiver.ticket().unwrap().to_string();
            println!("{ticket}");
            if let Some(file) = ticket_file {
                std::fs::write(file.with_extension("tmp"), &ticket)?;
                std::fs::rename(file.with_extension("tmp"), file)?;
            }
            receiver.run(once).await;
            receiver.close().await;
        }
        Command::Send {
            dir,
            to,
            name,
            base,
            bwlimit,
            ..
        } => {
            let to = match to.strip_prefix('@') {
                Some(file) => std::fs::read_to_string(file)?,
                None => to,
            };
            let state = std::env::var("HOME").unwrap_or("/root".into());
            let report = send(SendOptions {
                directory: dir,
                name: name.map(crxfer::delta::SetName::new).transpose()?,
                base: base.map(crxfer::delta::SetName::new).transpose()?,
                page_size: None,
                bytes_per_s: bwlimit,
                target: Target::Ticket(to.trim().parse()?),
                identity: Identity::load_or_create(
                    &PathBuf::from(state).join(".local/state/crxfer/identity.pem"),
                )?,
                transport: Options::default(),
                events: Events::none(),
            })
            .await?;
            println!("{report:?}");
        }
    }
    Ok(())
}
