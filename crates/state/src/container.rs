//! The file: a header and records.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Record;

/// What this version writes.
pub const FORMAT_VERSION: u32 = 1;
/// Longest container, in bytes. RAM is not in it.
pub const MAX_LEN: usize = 16 << 20;

const MAGIC: &[u8; 8] = b"wardian\n";
const FIXED: usize = 24;
const HEADER_CRC: usize = 16;
const MAX_HEADER: usize = 64 << 10;
const RECORD_MAGIC: &[u8; 4] = b"rec\n";
const RECORD_FIXED: usize = 24;
const RECORD_CRC: usize = 12;
const MAX_NAME: usize = 64;
const OPTIONAL: u16 = 1;
const END: &str = "end";

/// A container that cannot be read, or not by this version.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Not one of ours.
    #[error("This is not a saved machine: it does not begin with \"wardian\"")]
    Magic,
    /// Written by a later version.
    #[error(
        "The saved machine has format {found}, written by {producer:?}; this version reads up to {FORMAT_VERSION}"
    )]
    Format {
        /// Its format.
        found: u32,
        /// Who wrote it.
        producer: String,
    },
    /// It ends too early.
    #[error("The saved machine is cut off within {what}, at byte {at}")]
    Truncated {
        /// Part.
        what: String,
        /// Offset.
        at: usize,
    },
    /// Bytes are not what was written.
    #[error("The saved machine is damaged in {what}, at byte {at}: {why}")]
    Damaged {
        /// Part.
        what: String,
        /// Offset.
        at: usize,
        /// What is wrong.
        why: &'static str,
    },
    /// Longer than [`MAX_LEN`].
    #[error("A saved machine of {0} bytes is too long: {MAX_LEN} is the most")]
    TooLong(usize),
    /// No such record.
    #[error("The saved machine has no {0}")]
    Missing(String),
    /// Records that nobody asked for.
    #[error("The saved machine has parts that this machine or version does not know: {}", .0.join(", "))]
    LeftOver(Vec<String>),
    /// A record of another version.
    #[error("{name} of the saved machine has version {found}; this version of Wardian reads {known}")]
    Version {
        /// Record.
        name: String,
        /// Its version.
        found: u16,
        /// Ours.
        known: u16,
    },
    /// A record whose fields are not those of its kind.
    #[error("{name} of the saved machine cannot be read")]
    Payload {
        /// Record.
        name: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A record with fields that reading loses.
    #[error("{name} of the saved machine has fields that this version does not know, or not in that form")]
    Fields {
        /// Record.
        name: String,
    },
    /// A mistake of the one who saves: two records of one name, or a name that is none.
    #[error("{0:?} cannot be saved: its name is taken, too long or has odd characters")]
    Name(String),
}

/// What is known of a saved machine without knowing its parts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Header {
    /// Who wrote it: name and version.
    pub producer: String,
    /// Engine that ran it.
    pub engine: String,
    /// CPU model.
    pub cpu_model: String,
    /// How guest time was kept.
    pub time: String,
    /// Bytes of a page.
    pub page_size: u64,
    /// Bytes of guest RAM.
    pub memory: u64,
    /// vCPUs.
    pub vcpus: u64,
    /// Name of the machine.
    pub name: String,
    /// Host's wall clock when it was saved, in ns since the epoch.
    pub saved_at: u64,
    /// Fields of later versions.
    #[serde(flatten)]
    pub more: BTreeMap<String, Value>,
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

/// CRC-32 of `bytes` with the four bytes at `at` as zero.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes[..at]);
    crc.update(&[0; 4]);
    crc.update(&bytes[at + 4..]);
    crc.finalize()
}

fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | ':');
    name.len() <= MAX_NAME && name.chars().all(plain)
}

fn full_name(kind: &str, id: &str) -> String {
    if id.is_empty() { kind.to_owned() } else { format!("{kind} {id}") }
}

/// Puts a container together.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
    names: BTreeMap<(String, String), ()>,
}

impl Writer {
    /// A container with `header` and no records.
    ///
    /// # Errors
    /// When the header is too long.
    pub fn new(header: &Header) -> Result<Writer, StateError> {
        let mut bytes = vec![0; FIXED];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[12..16].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        let payload = |source| StateError::Payload { name: "header".to_owned(), source };
        serde_json::to_writer(&mut bytes, header).map_err(payload)?;
        bytes.resize((bytes.len() + 1).next_multiple_of(8) - 1, b' ');
        bytes.push(b'\n');
        if bytes.len() > MAX_HEADER {
            return Err(StateError::TooLong(bytes.len()));
        }
        let len = bytes.len() as u32;
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        let crc = checksum(&bytes, HEADER_CRC);
        bytes[HEADER_CRC..HEADER_CRC + 4].copy_from_slice(&crc.to_le_bytes());
        Ok(Writer { bytes, names: BTreeMap::new() })
    }

    /// Adds a record that a reader must know. `id` tells it from others of its kind.
    ///
    /// # Errors
    /// When there is one of that kind and id.
    pub fn add<R: Record>(&mut self, id: &str, record: &R) -> Result<(), StateError> {
        self.put::<R>(id, record, 0)
    }

    /// Adds a record that a reader may skip.
    ///
    /// # Errors
    /// As for [`Writer::add`].
    pub fn add_optional<R: Record>(&mut self, id: &str, record: &R) -> Result<(), StateError> {
        self.put::<R>(id, record, OPTIONAL)
    }

    fn put<R: Record>(&mut self, id: &str, record: &R, flags: u16) -> Result<(), StateError> {
        let name = full_name(R::KIND, id);
        let fits = is_name(R::KIND) && is_name(id) && R::KIND != END && !R::KIND.is_empty();
        if !fits || self.names.insert((R::KIND.to_owned(), id.to_owned()), ()).is_some() {
            return Err(StateError::Name(name));
        }
        let payload = |source| StateError::Payload { name, source };
        let payload = serde_json::to_vec(record).map_err(payload)?;
        self.append(R::KIND, id, R::VERSION, flags, &payload);
        Ok(())
    }

    fn append(&mut self, kind: &str, id: &str, version: u16, flags: u16, payload: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(RECORD_MAGIC);
        for half in [version, flags, kind.len() as u16, id.len() as u16] {
            self.bytes.extend_from_slice(&half.to_le_bytes());
        }
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&(payload.len() as u64).to_le_bytes());
        for part in [kind.as_bytes(), id.as_bytes(), payload] {
            self.bytes.extend_from_slice(part);
        }
        pad(&mut self.bytes);
        let crc = checksum(&self.bytes[start..], RECORD_CRC);
        self.bytes[start + RECORD_CRC..start + RECORD_CRC + 4].copy_from_slice(&crc.to_le_bytes());
    }

    /// The bytes.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        let end = format!("{{\"records\":{}}}", self.names.len());
        self.append(END, "", 1, 0, end.as_bytes());
        self.bytes
    }
}

/// A record that has not been taken yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Version of its layout.
    pub version: u16,
    /// Whether it may be skipped.
    pub optional: bool,
    /// Its fields.
    pub payload: Value,
}

/// What was read.
#[derive(Clone, Debug)]
pub struct Container {
    header: Header,
    entries: BTreeMap<(String, String), Entry>,
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from(half(bytes, at)) | u32::from(half(bytes, at + 2)) << 16
}

/// Reads one part after the other.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    fn damaged(&self, what: &str, why: &'static str) -> StateError {
        StateError::Damaged { what: what.to_owned(), at: self.at, why }
    }

    fn need(&self, what: &str, len: usize) -> Result<&'a [u8], StateError> {
        self.rest()
            .get(..len)
            .ok_or_else(|| StateError::Truncated { what: what.to_owned(), at: self.bytes.len() })
    }

    fn header(&mut self) -> Result<Header, StateError> {
        let what = "the header";
        if self.bytes.get(..8).is_none_or(|magic| magic != MAGIC) {
            return Err(StateError::Magic);
        }
        let fixed = self.need(what, FIXED)?;
        let (len, version) = (word(fixed, 8) as usize, word(fixed, 12));
        if !(FIXED..=MAX_HEADER).contains(&len) || !len.is_multiple_of(8) {
            return Err(self.damaged(what, "its length is not possible"));
        }
        let whole = self.need(what, len)?;
        if checksum(whole, HEADER_CRC) != word(fixed, HEADER_CRC) {
            return Err(self.damaged(what, "the checksum differs"));
        }
        let payload = |source| StateError::Payload { name: what.to_owned(), source };
        let header: Header = serde_json::from_slice(&whole[FIXED..]).map_err(payload)?;
        if version == 0 || version > FORMAT_VERSION {
            return Err(StateError::Format { found: version, producer: header.producer });
        }
        self.at += len;
        Ok(header)
    }

    fn record(&mut self) -> Result<((String, String), Entry), StateError> {
        let what = "a record";
        let fixed = self.need(what, RECORD_FIXED)?;
        if &fixed[..4] != RECORD_MAGIC {
            return Err(self.damaged(what, "a record does not begin here"));
        }
        let (kind_len, id_len) = (usize::from(half(fixed, 8)), usize::from(half(fixed, 10)));
        if kind_len == 0 || kind_len > MAX_NAME || id_len > MAX_NAME {
            return Err(self.damaged(what, "the length of its name is not possible"));
        }
        let names = self.need(what, RECORD_FIXED + kind_len + id_len)?;
        let name = |part: &[u8]| std::str::from_utf8(part).ok().filter(|n| is_name(n)).map(str::to_owned);
        let (kind, id) = names[RECORD_FIXED..].split_at(kind_len);
        let (Some(kind), Some(id)) = (name(kind), name(id)) else {
            return Err(self.damaged(what, "its name has odd characters"));
        };
        let full = full_name(&kind, &id);
        let payload_len = u64::from(word(fixed, 16)) | u64::from(word(fixed, 20)) << 32;
        let len = usize::try_from(payload_len).ok().filter(|len| *len <= MAX_LEN);
        let Some(payload_len) = len else {
            return Err(self.damaged(&full, "its length is not possible"));
        };
        let start = names.len();
        let whole = self.need(&full, (start + payload_len).next_multiple_of(8))?;
        if checksum(whole, RECORD_CRC) != word(fixed, RECORD_CRC) {
            return Err(self.damaged(&full, "the checksum differs"));
        }
        let flags = half(fixed, 6);
        if flags & !OPTIONAL != 0 {
            return Err(self.damaged(&full, "it has flags that this version does not know"));
        }
        let payload = serde_json::from_slice(&whole[start..start + payload_len])
            .map_err(|source| StateError::Payload { name: full, source })?;
        self.at += whole.len();
        Ok(((kind, id), Entry { version: half(fixed, 4), optional: flags & OPTIONAL != 0, payload }))
    }
}

impl Container {
    /// Reads the header alone; what follows may be anything.
    ///
    /// # Errors
    /// When it is damaged or of a later format, see [`StateError`].
    pub fn peek(bytes: &[u8]) -> Result<Header, StateError> {
        Cursor { bytes, at: 0 }.header()
    }

    /// Reads `bytes`.
    ///
    /// # Errors
    /// When anything at all is wrong with them.
    pub fn parse(bytes: &[u8]) -> Result<Container, StateError> {
        if bytes.len() > MAX_LEN {
            return Err(StateError::TooLong(bytes.len()));
        }
        let mut cursor = Cursor { bytes, at: 0 };
        let header = cursor.header()?;
        let mut entries = BTreeMap::new();
        loop {
            let begin = cursor.at;
            let (name, entry) = cursor.record()?;
            let full = full_name(&name.0, &name.1);
            let damaged = |why| StateError::Damaged { what: full.clone(), at: begin, why };
            if name.0 == END {
                let count = entry.payload.get("records").and_then(Value::as_u64);
                if count != Some(entries.len() as u64) {
                    return Err(damaged("records are missing"));
                }
                if !cursor.rest().is_empty() {
                    return Err(damaged("something follows the end"));
                }
                return Ok(Container { header, entries });
            }
            if entries.insert(name, entry).is_some() {
                return Err(damaged("it is there twice"));
            }
        }
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What has not been taken: kind, id, record.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &str, &Entry)> {
        self.entries.iter().map(|((kind, id), entry)| (kind.as_str(), id.as_str(), entry))
    }

    /// Takes a record out that must be there.
    ///
    /// # Errors
    /// When it is not, or cannot be read.
    pub fn take<R: Record>(&mut self, id: &str) -> Result<R, StateError> {
        self.take_if_there(id)?.ok_or_else(|| StateError::Missing(full_name(R::KIND, id)))
    }

    /// Takes a record out if it is there.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn take_if_there<R: Record>(&mut self, id: &str) -> Result<Option<R>, StateError> {
        let Some(entry) = self.entries.remove(&(R::KIND.to_owned(), id.to_owned())) else { return Ok(None) };
        let name = full_name(R::KIND, id);
        let payload = if entry.version == R::VERSION {
            entry.payload
        } else {
            let (found, known) = (entry.version, R::VERSION);
            R::upgrade(found, entry.payload).ok_or_else(|| StateError::Version {
                name: name.clone(),
                found,
                known,
            })?
        };
        let failed = |source| StateError::Payload { name: name.clone(), source };
        let record: R = R::deserialize(&payload).map_err(failed)?;
        if serde_json::to_value(&record).map_err(failed)? != payload {
            return Err(StateError::Fields { name });
        }
        Ok(Some(record))
    }

    /// All records have been taken.
    ///
    /// # Errors
    /// When some are left that may not be skipped.
    pub fn finish(self) -> Result<(), StateError> {
        let left = self.entries.iter().filter(|(_, entry)| !entry.optional);
        let names: Vec<String> = left.map(|((kind, id), _)| full_name(kind, id)).collect();
        if names.is_empty() { Ok(()) } else { Err(StateError::LeftOver(names)) }
    }
}
