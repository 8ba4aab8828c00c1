//! A client of the GDB remote protocol (GDB manual, appendix E) over a Unix socket, as far as lock-step needs it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Where a register lies in the answer to `g`.
#[derive(Clone, Copy, Debug)]
struct Place {
    number: usize,
    offset: usize,
    len: usize,
}

/// A connection to one stub.
pub struct Client {
    stream: UnixStream,
    buffer: Vec<u8>,
    registers: BTreeMap<String, Place>,
}

/// The registers of one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registers(pub BTreeMap<String, u128>);

impl Registers {
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).map_or(0, |value| *value as u64)
    }
}

/// Registers that QEMU's stub describes and does not have: those behind them come that much sooner.
const ABSENT: [&str; 3] = ["ss_base", "ds_base", "es_base"];

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &[u8]) -> Vec<u8> {
    let digit = |byte: u8| (byte as char).to_digit(16).unwrap_or(0) as u8;
    text.chunks_exact(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

impl Client {
    /// Connects as soon as somebody listens at `path`, and learns the layout of the registers.
    ///
    /// # Errors
    /// When nobody does within ten seconds, or the stub does not describe its registers.
    pub fn connect(path: &Path) -> Result<Client> {
        let began = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if began.elapsed() < Duration::from_secs(10) => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("Nobody listens at {}", path.display()));
                }
            }
        };
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut client = Client { stream, buffer: Vec::new(), registers: BTreeMap::new() };
        client.ask("qSupported:xmlRegisters=i386")?;
        client.ask("?")?;
        let mut text = String::new();
        client.collect_xml("target.xml", &mut text, 0)?;
        client.layout(&text, &[]);
        let whole: usize = client.registers.values().map(|place| place.len).sum();
        let sent = client.ask("g")?.len() / 2;
        if sent + ABSENT.len() * 8 == whole {
            client.layout(&text, &ABSENT);
        } else if sent != whole {
            bail!("The stub at {} describes {whole} bytes of registers and sends {sent}", path.display());
        }
        if client.registers.len() < 20 {
            bail!("The stub at {} describes {} registers", path.display(), client.registers.len());
        }
        Ok(client)
    }

    fn collect_xml(&mut self, name: &str, text: &mut String, depth: u32) -> Result<()> {
        if depth > 4 {
            bail!("The stub's target description includes itself");
        }
        let mut whole = Vec::new();
        loop {
            let part = self.ask(&format!("qXfer:features:read:{name}:{:x},ff0", whole.len()))?;
            whole.extend_from_slice(part.get(1..).unwrap_or_default());
            match part.first() {
                Some(b'm') => {}
                Some(b'l') => break,
                _ => bail!("The stub has no {name}"),
            }
        }
        let page = String::from_utf8_lossy(&whole);
        for tag in page.split('<') {
            if let Some(file) = tag.strip_prefix("xi:include").and_then(|tag| attribute(tag, "href")) {
                self.collect_xml(&file, text, depth + 1)?;
            } else if tag.starts_with("reg ") {
                text.push_str(tag);
                text.push('<');
            }
        }
        Ok(())
    }

    /// Registers lie in the answer to `g` in the order of their numbers.
    fn layout(&mut self, text: &str, without: &[&str]) {
        self.registers.clear();
        let (mut number, mut offset) = (0, 0);
        for tag in text.split('<') {
            let (Some(name), Some(bits)) = (attribute(tag, "name"), attribute(tag, "bitsize")) else {
                continue;
            };
            if without.contains(&name.as_str()) {
                continue;
            }
            let len = bits.parse::<usize>().unwrap_or(0) / 8;
            if let Some(stated) = attribute(tag, "regnum").and_then(|text| text.parse().ok()) {
                number = stated;
            }
            self.registers.insert(name, Place { number, offset, len });
            number += 1;
            offset += len;
        }
    }

    /// Sends a packet.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn send(&mut self, packet: &str) -> Result<()> {
        let sum = packet.bytes().fold(0u8, u8::wrapping_add);
        write!(self.stream, "${packet}#{sum:02x}").context("The stub is gone")
    }

    /// The next packet of the stub; `None` when it has closed the connection.
    ///
    /// # Errors
    /// When nothing comes in time.
    pub fn receive(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            if let Some(start) = self.buffer.iter().position(|byte| *byte == b'$')
                && let Some(len) = self.buffer[start..].iter().position(|byte| *byte == b'#')
                && self.buffer.len() >= start + len + 3
            {
                let raw = self.buffer[start + 1..start + len].to_vec();
                self.buffer.drain(..start + len + 3);
                let _ = self.stream.write_all(b"+");
                return Ok(Some(expand(&raw)));
            }
            let mut part = [0u8; 4096];
            match self.stream.read(&mut part) {
                Ok(0) => return Ok(None),
                Ok(len) => self.buffer.extend_from_slice(&part[..len]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error).context("The stub does not answer"),
            }
        }
    }

    /// Sends a packet and waits for the answer.
    ///
    /// # Errors
    /// When there is none.
    pub fn ask(&mut self, packet: &str) -> Result<Vec<u8>> {
        self.send(packet)?;
        self.receive()?.with_context(|| format!("The stub is gone before it answered {packet}"))
    }

    fn accepted(&mut self, packet: &str) -> Result<()> {
        let answer = self.ask(packet)?;
        if answer != b"OK" {
            bail!("The stub answers {packet} with {}", String::from_utf8_lossy(&answer));
        }
        Ok(())
    }

    /// Takes the answer to `g`.
    ///
    /// # Errors
    /// When it is too short.
    pub fn registers(&mut self) -> Result<Registers> {
        let bytes = unhex(&self.receive()?.context("The stub is gone")?);
        let mut all = BTreeMap::new();
        for (name, place) in &self.registers {
            let Some(value) = bytes.get(place.offset..place.offset + place.len) else { continue };
            let mut wide = [0u8; 16];
            wide[..place.len.min(16)].copy_from_slice(&value[..place.len.min(16)]);
            all.insert(name.clone(), u128::from_le_bytes(wide));
        }
        Ok(Registers(all))
    }

    /// Writes one register.
    ///
    /// # Errors
    /// When the stub refuses.
    pub fn write_register(&mut self, name: &str, value: u128) -> Result<()> {
        let place = *self.registers.get(name).with_context(|| format!("The stub has no register {name}"))?;
        self.accepted(&format!("P{:x}={}", place.number, hex(&value.to_le_bytes()[..place.len])))
    }

    /// Reads linear memory; shorter where it ends.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn memory(&mut self, at: u64, len: usize) -> Result<Vec<u8>> {
        let answer = self.ask(&format!("m{at:x},{len:x}"))?;
        Ok(if answer.first() == Some(&b'E') { Vec::new() } else { unhex(&answer) })
    }

    /// Writes linear memory.
    ///
    /// # Errors
    /// When the stub refuses.
    pub fn write_memory(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.accepted(&format!("M{at:x},{:x}:{}", bytes.len(), hex(bytes)))
    }

    /// Runs to the instruction at `at`.
    ///
    /// # Errors
    /// When the stub refuses, or the guest does not come there.
    pub fn run_to(&mut self, at: u64) -> Result<()> {
        self.accepted(&format!("Z1,{at:x},1"))?;
        self.ask("c")?;
        self.accepted(&format!("z1,{at:x},1"))
    }
}

fn attribute(tag: &str, name: &str) -> Option<String> {
    let at = tag.find(&format!(" {name}=\""))? + name.len() + 3;
    let rest = &tag[at..];
    Some(rest[..rest.find('"')?].to_owned())
}

/// Undoes run-length encoding and escapes.
fn expand(raw: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> = Vec::with_capacity(raw.len());
    let mut bytes = raw.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b'}' => out.extend(bytes.next().map(|next| next ^ 0x20)),
            b'*' => {
                let count = bytes.next().map_or(0, |next| usize::from(next.saturating_sub(29)));
                let last = out.last().copied().unwrap_or(b'0');
                out.extend(std::iter::repeat_n(last, count));
            }
            _ => out.push(byte),
        }
    }
    out
}
