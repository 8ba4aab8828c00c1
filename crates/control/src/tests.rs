//! The socket of a machine that runs: every route as the document says, and whatever else a client may send.

mod document;
mod hostile;
mod uses;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use wardian_machine::{Config, Control, Machine, Outcome, Seat};

use crate::desk::Desk;
use crate::place::Directory;

/// hlt; jmp -3
const SLEEPS: &[u8] = &[0xf4, 0xeb, 0xfd];
/// Echoes what comes in at the first serial port: mov edx, 3FDh; in al, dx; test al, 1; jz -5; mov edx, 3F8h; in al,
/// dx; out dx, al; jmp to the start.
const ECHOES: &[u8] =
    &[0xba, 0xfd, 3, 0, 0, 0xec, 0xa8, 1, 0x74, 0xfb, 0xba, 0xf8, 3, 0, 0, 0xec, 0xee, 0xeb, 0xed];

/// A multiboot 1 kernel (an image without ELF, loaded at 1 MiB by its address fields) whose code is `code`.
fn kernel(code: &[u8]) -> Vec<u8> {
    const BASE: u32 = 0x10_0000;
    const FLAGS: u32 = 1 << 16;
    let magic = 0x1bad_b002u32;
    let end = BASE + 0x20 + code.len() as u32;
    let words = [magic, FLAGS, 0u32.wrapping_sub(magic + FLAGS), BASE, BASE, end, end, BASE + 0x20];
    let mut image: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.extend_from_slice(code);
    image
}

/// A machine with its socket, on a thread of its own.
struct Case {
    dir: TempDir,
    directory: Directory,
    control: Control,
    thread: Option<JoinHandle<Outcome>>,
}

impl Case {
    fn new(code: &[u8], cpus: &str) -> Case {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("kernel");
        std::fs::write(&image, kernel(code)).unwrap();
        let config = Config {
            name: Some("box".into()),
            kernel: Some(image),
            memory: Some("4M".parse().unwrap()),
            cpus: Some(cpus.parse().unwrap()),
            debug_console: Some("none".parse().unwrap()),
            ..Config::default()
        };
        let user = rustix::process::geteuid().as_raw();
        let directory = Directory::at(dir.path().join("wardian"), user).unwrap();
        let desk = Desk::new();
        let seat = Seat { detached: true, screen: Some(desk.screen()) };
        let mut machine = Machine::build_at(config, seat).unwrap();
        let events = desk.clone();
        machine.on_event(move |event| events.event(event));
        let server = desk.open(&machine, &directory).unwrap();
        let control = machine.control();
        let thread = std::thread::spawn(move || {
            let outcome = machine.run();
            server.close(&outcome);
            outcome
        });
        let made = Case { dir, directory, control, thread: Some(thread) };
        until("it runs", || made.control.status() == wardian_machine::Status::Running);
        made
    }

    fn path(&self) -> PathBuf {
        self.directory.socket("box")
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Sends bytes, hangs up, and reads until the other side closes.
    fn raw(&self, bytes: &[u8]) -> Vec<u8> {
        self.send(bytes, true)
    }

    fn send(&self, bytes: &[u8], hang_up: bool) -> Vec<u8> {
        let mut stream = self.connect();
        // It may have been refused before all was sent.
        let _ = stream.write_all(bytes);
        if hang_up {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        answer
    }

    /// One request with these lines in its head, and its answer: status, kind, body.
    fn ask(&self, method: &str, path: &str, head: &str, body: &[u8]) -> Answer {
        let mut text =
            format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}").into_bytes();
        if !body.is_empty() {
            text.extend(format!("Content-Length: {}\r\n", body.len()).bytes());
        }
        text.extend(b"\r\n");
        text.extend(body);
        Answer::parse(&self.send(&text, false))
    }

    fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "", b"")
    }

    fn post(&self, path: &str, body: &str) -> Answer {
        self.ask("POST", path, "Content-Type: application/json\r\n", body.as_bytes())
    }

    fn end(mut self) {
        self.control.end();
        self.thread.take().unwrap().join().unwrap();
        assert!(!self.path().exists(), "a dead machine leaves nothing behind");
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        self.control.end();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = &self.dir;
    }
}

/// What came back.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Answer {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
        let end = end.unwrap_or_else(|| panic!("no answer: {:?}", String::from_utf8_lossy(bytes)));
        let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
        let mut body = bytes[end + 4..].to_vec();
        if head.contains("transfer-encoding: chunked") {
            body = unchunk(&body);
        }
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or_default();
        Answer { status, head, body }
    }

    fn kind(&self) -> &str {
        let line = self.head.lines().find_map(|line| line.strip_prefix("content-type: "));
        line.unwrap_or_default().split(';').next().unwrap_or_default()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    fn error(&self) -> (u16, String) {
        (self.status, self.json()["error"].as_str().unwrap_or_default().to_owned())
    }
}

/// RFC 9112, 7.1, as far as a server of ours uses it.
fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(end) = bytes.windows(2).position(|two| two == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap(), 16).unwrap();
        let chunk = &bytes[end + 2..];
        all.extend_from_slice(&chunk[..size]);
        bytes = &chunk[size + 2..];
        if size == 0 {
            break;
        }
    }
    all
}

fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..6000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("not within 60 s: {what}");
}

/// A case that several threads use.
fn shared(code: &[u8], cpus: &str) -> Arc<Case> {
    Arc::new(Case::new(code, cpus))
}
