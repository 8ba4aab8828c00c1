//! The block device (virtio 1.2, 5.2).

use std::io;

use wardian_backend::Disk;
use wardian_backend::disk::SECTOR_SIZE;
use wardian_memory::{Gpa, GuestMemory};

use crate::{Buffers, Chain, OwnState, VirtioDevice};

const QUEUE_SIZE: u16 = 256;
const MAX_QUEUES: usize = 16;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// Bytes of a request's header, of a discard or write-zeroes segment, and of the ID.
const HEADER_LEN: u64 = 16;
const SEGMENT_LEN: u64 = 16;
const ID_LEN: usize = 20;
/// Segments of one discard or write-zeroes request.
const MAX_SEGMENTS: u32 = 32;
/// Sectors of one such segment: 1 GiB, so that no request keeps a worker for long.
const MAX_SEGMENT_SECTORS: u32 = 1 << 21;
/// Write-zeroes segment flag: the space may be given back.
const FLAG_UNMAP: u32 = 1;

/// What a request ends with: its status byte.
enum Failure {
    /// Worth a word in the log: the host failed.
    Host(io::Error),
    /// The request makes no sense.
    Request,
    /// Not a request of ours.
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        match error.kind() {
            // The guest's mistakes, as `Disk` reports them.
            io::ErrorKind::InvalidInput
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::PermissionDenied => Failure::Request,
            _ => Failure::Host(error),
        }
    }
}

pub(crate) struct Block {
    disk: Disk,
    queues: usize,
    config: Vec<u8>,
    id: [u8; ID_LEN],
}

impl Block {
    pub(crate) fn new(disk: Disk, queues: usize) -> Block {
        let queues = queues.clamp(1, MAX_QUEUES);
        let mut config = vec![0; 60];
        let mut set = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        set(0, &(disk.size() / SECTOR_SIZE).to_le_bytes());
        set(12, &(u32::from(QUEUE_SIZE) - 2).to_le_bytes()); // seg_max
        set(20, &(SECTOR_SIZE as u32).to_le_bytes()); // blk_size
        set(24, &[3, 0]); // physical_block_exp: 4096 bytes
        set(26, &8u16.to_le_bytes()); // min_io_size, in blocks
        set(34, &(queues as u16).to_le_bytes());
        set(36, &MAX_SEGMENT_SECTORS.to_le_bytes()); // max_discard_sectors
        set(40, &MAX_SEGMENTS.to_le_bytes()); // max_discard_seg
        set(44, &8u32.to_le_bytes()); // discard_sector_alignment
        set(48, &MAX_SEGMENT_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        set(52, &MAX_SEGMENTS.to_le_bytes()); // max_write_zeroes_seg
        set(56, &[1]); // write_zeroes_may_unmap
        let mut id = [0; ID_LEN];
        let name = disk.path().file_name().map(|name| name.to_string_lossy().into_owned());
        let name = name.unwrap_or_default().replace(|c: char| !c.is_ascii_graphic(), "_");
        for (to, from) in id.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Block { disk, queues, config, id }
    }

    /// The same device with the ID that its disk had: the file may have another name now.
    pub(crate) fn with_id(self, own: &OwnState) -> Block {
        match *own {
            OwnState::Block { id, .. } => Block { id, ..self },
            _ => self,
        }
    }

    fn data_len(data: &Buffers) -> Result<u64, Failure> {
        let len = data.len();
        if len.is_multiple_of(SECTOR_SIZE) { Ok(len) } else { Err(Failure::Request) }
    }

    fn offset(sector: u64) -> Result<u64, Failure> {
        sector.checked_mul(SECTOR_SIZE).ok_or(Failure::Request)
    }

    /// Carries out a request; returns the bytes written before the status byte.
    fn request(&self, features: u64, mem: &GuestMemory, chain: &mut Chain) -> Result<u64, Failure> {
        let mut header = [0; HEADER_LEN as usize];
        let front = chain.readable.take_front(HEADER_LEN).ok_or(Failure::Request)?;
        if !chain.valid || !front.read(mem, &mut header) {
            return Err(Failure::Request);
        }
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = header[8..].iter().rev().fold(0u64, |all, byte| all << 8 | u64::from(*byte));
        match kind {
            T_IN => {
                let len = Block::data_len(&chain.writable)?;
                let into = chain.writable.slices(mem).ok_or(Failure::Request)?;
                self.disk.read_at(Block::offset(sector)?, &into)?;
                Ok(len)
            }
            T_OUT => {
                Block::data_len(&chain.readable)?;
                let from = chain.readable.slices(mem).ok_or(Failure::Request)?;
                self.disk.write_at(Block::offset(sector)?, &from)?;
                // A driver that cannot flush believes that what is written is safe (5.2.6.2).
                if features & F_FLUSH == 0 {
                    self.disk.flush()?;
                }
                Ok(0)
            }
            T_FLUSH => {
                self.disk.flush()?;
                Ok(0)
            }
            T_GET_ID => match chain.writable.write(mem, &self.id) {
                0 => Err(Failure::Request),
                written => Ok(written as u64),
            },
            T_DISCARD => self.segments(mem, &mut chain.readable, false),
            T_WRITE_ZEROES => self.segments(mem, &mut chain.readable, true),
            _ => Err(Failure::Unsupported),
        }
    }

    /// Discard and write-zeroes: all segments are checked before the first is touched.
    fn segments(&self, mem: &GuestMemory, data: &mut Buffers, zeroes: bool) -> Result<u64, Failure> {
        let count = data.len() / SEGMENT_LEN;
        if count == 0 || count > u64::from(MAX_SEGMENTS) || !data.len().is_multiple_of(SEGMENT_LEN) {
            return Err(Failure::Request);
        }
        let mut bytes = vec![0; data.len() as usize];
        if !data.read(mem, &mut bytes) {
            return Err(Failure::Request);
        }
        let mut all = Vec::with_capacity(count as usize);
        for segment in bytes.chunks_exact(SEGMENT_LEN as usize) {
            let number = |at: std::ops::Range<usize>| {
                segment[at].iter().rev().fold(0u64, |all, byte| all << 8 | u64::from(*byte))
            };
            let (sector, sectors, flags) = (number(0..8), number(8..12), number(12..16) as u32);
            let known = if zeroes { FLAG_UNMAP } else { 0 };
            if flags & !known != 0 {
                return Err(Failure::Unsupported);
            }
            let (offset, len) = (Block::offset(sector)?, sectors * SECTOR_SIZE);
            if sectors > u64::from(MAX_SEGMENT_SECTORS)
                || offset.checked_add(len).is_none_or(|end| end > self.disk.size())
            {
                return Err(Failure::Request);
            }
            all.push((offset, len, flags & FLAG_UNMAP != 0));
        }
        for (offset, len, unmap) in all {
            if zeroes {
                self.disk.write_zeroes(offset, len, unmap)?;
            } else {
                self.disk.discard(offset, len)?;
            }
        }
        Ok(0)
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> &str {
        "virtio-blk"
    }

    fn device_type(&self) -> u16 {
        2
    }

    fn class(&self) -> u32 {
        0x01_00_00
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues]
    }

    fn features(&self) -> u64 {
        let always = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_MQ;
        always | if self.disk.read_only() { F_RO } else { F_DISCARD | F_WRITE_ZEROES }
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn save(&self) -> OwnState {
        OwnState::Block { id: self.id, size: self.disk.size(), read_only: self.disk.read_only() }
    }

    fn flush(&self) {
        if let Err(error) = self.disk.flush() {
            tracing::error!("Could not flush disk {}: {error}", self.disk.path().display());
        }
    }

    fn handle(&self, _queue: usize, features: u64, mem: &GuestMemory, mut chain: Chain) -> u32 {
        let Some(Gpa(at)) = chain.writable.take_last_byte() else {
            // Nowhere to answer.
            return 0;
        };
        let (status, written) = match self.request(features, mem, &mut chain) {
            Ok(written) => (S_OK, written),
            Err(Failure::Unsupported) => (S_UNSUPP, 0),
            Err(Failure::Request) => (S_IOERR, 0),
            Err(Failure::Host(error)) => {
                tracing::error!("I/O on disk {} failed: {error}", self.disk.path().display());
                (S_IOERR, 0)
            }
        };
        if mem.write(Gpa(at), &[status]).is_err() {
            return 0;
        }
        written as u32 + 1
    }
}
