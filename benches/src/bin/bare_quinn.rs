//! The yardstick for transfers: reads the files of a directory, sends them over one QUIC connection
//! and writes them to another directory. No digests, no pages, no resume: what QUIC itself costs.
//!
//! ```text
//! bare_quinn run  FROM INTO        both ends, in two processes: prints one JSON line
//! bare_quinn recv INTO ADDR        prints a ticket, takes one connection
//! bare_quinn send FROM TICKET
//! ```
//! Options (both ends): `--streams N` `--packet BYTES` `--window BYTES` `--buffer BYTES` `--acks N`
//! `--cc NAME` `--no-gso` `--threads N` (0: single-thread runtime) `--copy` (write from a buffer in
//! place of handing it over) `--block BYTES` `--discard` (receive without writing).

#![expect(clippy::disallowed_methods, reason = "a bench reads the clock")]

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use crxfer::ticket::{Secret, Ticket};
use crxfer::transport::{
    BulkReceiver, BulkSender, CloseCode, Connection, Identity, Options, Server, Trust, connect,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// What the command line says.
#[derive(Clone)]
struct Setup {
    words: Vec<String>,
    options: Options,
    streams: usize,
    threads: usize,
    block: usize,
    copy: bool,
    discard: bool,
}

fn main() -> Result<()> {
    let setup = parse(std::env::args().skip(1))?;
    let words: Vec<&str> = setup.words.iter().map(String::as_str).collect();
    match words[..] {
        ["run", from, into] => run(from, into),
        ["recv", into, address] => runtime(&setup)?.block_on(receive(&setup, into, address)),
        ["send", from, ticket] => runtime(&setup)?.block_on(send(&setup, from, ticket)),
        _ => Err("usage: bare_quinn run FROM INTO | recv INTO ADDR | send FROM TICKET".into()),
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Setup> {
    let mut setup = Setup {
        words: Vec::new(),
        options: Options::default(),
        streams: 1,
        threads: 0,
        block: 256 << 10,
        copy: false,
        discard: false,
    };
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--streams" => setup.streams = value()?.parse()?,
            "--threads" => setup.threads = value()?.parse()?,
            "--block" => setup.block = value()?.parse()?,
            "--packet" => setup.options.max_packet_bytes = value()?.parse()?,
            "--window" => {
                setup.options.receive_window = value()?.parse()?;
                setup.options.send_window = setup.options.receive_window;
            }
            "--buffer" => setup.options.socket_buffer = value()?.parse()?,
            "--acks" => setup.options.packets_per_ack = value()?.parse()?,
            "--cc" => setup.options.congestion_control = value()?.parse()?,
            "--no-gso" => setup.options.segmentation_offload = false,
            "--copy" => setup.copy = true,
            "--discard" => setup.discard = true,
            _ => setup.words.push(argument),
        }
    }
    Ok(setup)
}

fn runtime(setup: &Setup) -> Result<tokio::runtime::Runtime> {
    let mut builder = match setup.threads {
        0 => tokio::runtime::Builder::new_current_thread(),
        threads => {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            builder.worker_threads(threads);
            builder
        }
    };
    Ok(builder.enable_all().build()?)
}

/// Both ends as processes of their own, with this process's options.
fn run(from: &str, into: &str) -> Result<()> {
    let program = std::env::current_exe()?;
    let options: Vec<String> = std::env::args().skip(4).collect();
    let mut receiver = Command::new(&program)
        .args(["recv", into, "127.0.0.1:0"])
        .args(&options)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(receiver.stdout.take().ok_or("no output")?).lines();
    let ticket = lines.next().ok_or("the receiver printed no ticket")??;
    let sent = Command::new(&program)
        .args(["send", from, &ticket])
        .args(&options)
        .status()?;
    let received = receiver.wait()?;
    if sent.success() && received.success() {
        Ok(())
    } else {
        Err("one end failed".into())
    }
}

async fn receive(setup: &Setup, into: &str, address: &str) -> Result<()> {
    std::fs::create_dir_all(into)?;
    let identity = Identity::generate()?;
    let listen = [address.parse()?];
    let server = Server::bind(&listen, identity, Trust::Anyone, setup.options.clone())?;
    let ticket = Ticket::new(
        server.local_addresses()?,
        server.fingerprint(),
        Secret::generate(),
    )?;
    println!("{ticket}");
    let connection = server.accept().await.ok_or("closed")?.complete().await?;
    let (mut reply, mut requests) = connection.accept_control().await?;
    while let Some(name) = requests.read_message(4096).await? {
        let path = Path::new(into).join(String::from_utf8(name)?);
        let file = Arc::new(File::create(path)?);
        let mut writers = Vec::new();
        for _ in 0..setup.streams {
            let stream = connection.accept_bulk().await?;
            writers.push(tokio::spawn(write_stripe(
                stream,
                file.clone(),
                setup.discard,
            )));
        }
        for writer in writers {
            writer.await??;
        }
        reply.write_message(b"written").await?;
    }
    connection.close_and_tell(CloseCode::Done, "").await;
    eprintln!(
        "{{\"receiver_cpu_s\":{:.2},\"receiver_peak_rss_kib\":{}}}",
        cpu_seconds(),
        status("VmHWM:")
    );
    Ok(())
}

/// Frames of (offset u64, length u64, bytes) until the stream ends.
async fn write_stripe(mut stream: BulkReceiver, file: Arc<File>, discard: bool) -> Result<()> {
    let mut header = [0; 16];
    while stream.read_exact(&mut header).await? {
        let (offset, length) = header.split_at(8);
        let mut offset = u64::from_le_bytes(offset.try_into()?);
        let mut left = usize::try_from(u64::from_le_bytes(length.try_into()?))?;
        while left > 0 {
            let chunk = stream.read(left).await?.ok_or("cut short")?;
            if !discard {
                file.write_all_at(&chunk, offset)?;
            }
            offset += chunk.len() as u64;
            left -= chunk.len();
        }
    }
    Ok(())
}

async fn send(setup: &Setup, from: &str, ticket: &str) -> Result<()> {
    let ticket: Ticket = ticket.parse()?;
    let identity = Identity::generate()?;
    let begin = Instant::now();
    let connection = connect(
        ticket.addresses(),
        &identity,
        &[ticket.fingerprint()],
        &setup.options,
    )
    .await?;
    let (mut requests, mut replies) = connection.open_control().await?;
    let mut files: Vec<PathBuf> = std::fs::read_dir(from)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.sort();
    let mut bytes = 0;
    for path in files {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or("a strange name")?;
        requests.write_message(name.as_bytes()).await?;
        bytes += send_file(setup, &connection, &path).await?;
        replies.read_message(16).await?.ok_or("no answer")?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    report(&connection, bytes, seconds);
    requests.finish()?;
    // The receiver closes once it has seen the end.
    connection.closed().await;
    Ok(())
}

async fn send_file(setup: &Setup, connection: &Connection, path: &Path) -> Result<u64> {
    let file = Arc::new(File::open(path)?);
    let length = file.metadata()?.len();
    let next = Arc::new(AtomicU64::new(0));
    let mut readers = Vec::new();
    for _ in 0..setup.streams {
        let stream = connection.open_bulk().await?;
        let stripe = (file.clone(), length, next.clone());
        readers.push(tokio::spawn(read_stripe(
            stream,
            stripe,
            setup.block,
            setup.copy,
        )));
    }
    for reader in readers {
        reader.await??;
    }
    Ok(length)
}

/// Takes blocks of the file as long as there are any.
async fn read_stripe(
    mut stream: BulkSender,
    (file, length, next): (Arc<File>, u64, Arc<AtomicU64>),
    block: usize,
    copy: bool,
) -> Result<()> {
    let mut buffer = vec![0; block];
    loop {
        let offset = next.fetch_add(block as u64, Ordering::Relaxed);
        if offset >= length {
            break;
        }
        let count = usize::try_from((length - offset).min(block as u64))?;
        file.read_exact_at(&mut buffer[..count], offset)?;
        let header = [offset.to_le_bytes(), (count as u64).to_le_bytes()].concat();
        let payload = if copy {
            Bytes::copy_from_slice(&buffer[..count])
        } else {
            buffer.truncate(count);
            std::mem::replace(&mut buffer, vec![0; block]).into()
        };
        stream.write_parts(&mut [header.into(), payload]).await?;
    }
    Ok(stream.finish()?)
}

fn report(connection: &Connection, bytes: u64, seconds: f64) {
    let path = connection.path();
    let (sent, received) = connection.wire_bytes();
    println!(
        "{{\"bytes\":{bytes},\"seconds\":{seconds:.4},\"gigabytes_per_s\":{:.3},\"packet_bytes\":{},\"sent_packets\":{},\"lost_packets\":{},\"congestion_events\":{},\"wire_sent\":{sent},\"wire_received\":{received},\"peak_rss_kib\":{},\"cpu_s\":{:.2}}}",
        bytes as f64 / seconds / 1e9,
        path.packet_bytes,
        path.sent_packets,
        path.lost_packets,
        path.congestion_events,
        status("VmHWM:"),
        cpu_seconds(),
    );
}

/// A field of /proc/self/status, in KiB.
fn status(field: &str) -> u64 {
    let mut text = String::new();
    let _ = OpenOptions::new()
        .read(true)
        .open("/proc/self/status")
        .and_then(|mut file| file.read_to_string(&mut text));
    text.lines()
        .find_map(|line| {
            line.strip_prefix(field)?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .unwrap_or(0)
}

/// User and system time of this process.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let behind_name = text.rsplit(')').next().unwrap_or_default();
    let ticks: u64 = behind_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|n| n.parse::<u64>().ok())
        .sum();
    ticks as f64 / 100.0
}
