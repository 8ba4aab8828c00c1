//! RAM in a file, in one of two forms.
//!
//! *Flat*: page n lies at n times the size of a page; pages of zeros are holes. A machine can run on it before it has
//! been read. *Packed*: chunk after chunk, each a table of what its pages are (zeros, data, the same as an earlier
//! page) and the data, compressed with zstd.
//!
//! Both are checked by a CRC-32 for each chunk of 1 MiB of RAM, in the record that goes with the file. That of a flat
//! chunk covers its pages as they are, that of a packed one its bytes in the file.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use wardian_memory::{GuestMemory, PAGE_SIZE};
use wardian_state::{Record, Refused};

use crate::TransferError;

const PAGE: usize = PAGE_SIZE as usize;
/// Pages of a chunk.
const CHUNK: usize = 256;
const CHUNK_LEN: usize = CHUNK * PAGE;
/// What a page is, in a packed chunk; from `SAME` on: what page number less `SAME` is.
const ZERO: u32 = 0;
const DATA: u32 = 1;
const SAME: u32 = 2;
/// The least effort: a guest waits meanwhile.
const LEVEL: i32 = 1;
/// Most bytes of RAM, as `GuestMemory` has it.
const MAX_SIZE: u64 = 1 << 40;

/// How RAM is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// As it is, with holes.
    #[default]
    Flat,
    /// Compressed.
    Packed,
}

/// One chunk that holds something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Its number.
    pub number: u32,
    /// Where it lies in the file.
    pub offset: u64,
    /// Its bytes in the file.
    pub len: u32,
    /// CRC-32.
    pub crc: u32,
}

/// What the file of RAM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageState {
    /// Its form.
    pub form: Form,
    /// Bytes of RAM.
    pub size: u64,
    /// Pages that hold something.
    pub pages: u64,
    /// Of those, pages that are the same as an earlier one and are not kept twice.
    pub same: u64,
    /// Chunks in which there are such pages.
    pub chunks: Vec<Chunk>,
}

impl Record for ImageState {
    const KIND: &'static str = "memory";
    const VERSION: u16 = 1;
}

impl ImageState {
    /// Whether it makes sense in itself, for a file of `len` bytes.
    ///
    /// # Errors
    /// When it does not.
    pub fn check(&self, len: u64) -> Result<(), Refused> {
        let refuse = |why: String| Err(Refused::new::<ImageState>(why));
        if self.size == 0 || self.size > MAX_SIZE || !self.size.is_multiple_of(PAGE_SIZE) {
            return refuse(format!("{} bytes are no RAM", self.size));
        }
        if self.form == Form::Flat && len != self.size {
            return refuse(format!("the file has {len} bytes, RAM {}", self.size));
        }
        let count = self.size.div_ceil(CHUNK_LEN as u64);
        let mut next = 0;
        for chunk in &self.chunks {
            let Chunk { number, offset, len: bytes, .. } = *chunk;
            let inside = offset.checked_add(u64::from(bytes)).is_some_and(|end| end <= len);
            let in_place = self.form == Form::Packed || offset == u64::from(number) * CHUNK_LEN as u64;
            if u64::from(number) >= count || number < next || !inside || !in_place {
                return refuse(format!("chunk {number} lies outside of it"));
            }
            next = number + 1;
        }
        Ok(())
    }
}

/// RAM that is being read, a chunk at a time.
struct Source<'a> {
    memory: &'a GuestMemory,
    buffer: Vec<u8>,
}

impl Source<'_> {
    /// The pages `range`, at most a chunk.
    fn read(&mut self, range: Range<u64>) -> &[u8] {
        let len = (range.end - range.start) as usize * PAGE;
        let mut at = 0;
        while at < len {
            let page = range.start + (at / PAGE) as u64;
            // Of one region only: low and high RAM lie apart.
            let mut count = 1;
            let Some(gpa) = self.memory.page_address(page) else { break };
            while at + count * PAGE < len
                && self
                    .memory
                    .page_address(page + count as u64)
                    .is_some_and(|next| next.0 == gpa.0 + (count * PAGE) as u64)
            {
                count += 1;
            }
            // It is RAM, so the read succeeds.
            let _ = self.memory.read(gpa, &mut self.buffer[at..at + count * PAGE]);
            at += count * PAGE;
        }
        &self.buffer[..len]
    }
}

fn is_zero(page: &[u8]) -> bool {
    // By words, eagerly: most pages that are not zero show it at once.
    page.chunks(64).all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

/// The chunks that `spans` of pages touch, each with its spans.
fn by_chunk(spans: &[Range<u64>]) -> Vec<(u32, Range<u64>)> {
    let mut all: Vec<(u32, Range<u64>)> = Vec::new();
    for span in spans {
        let mut at = span.start;
        while at < span.end {
            let number = at / CHUNK as u64;
            let end = span.end.min((number + 1) * CHUNK as u64);
            match all.last_mut() {
                Some((last, range)) if u64::from(*last) == number => range.end = end,
                _ => all.push((number as u32, at..end)),
            }
            at = end;
        }
    }
    all
}

/// Writes the RAM of `memory`, which nobody writes meanwhile, to the empty file `file`.
///
/// # Errors
/// The host's, such as a full disk.
pub fn write(memory: &GuestMemory, file: &File, form: Form) -> io::Result<ImageState> {
    let mut state = ImageState { form, size: memory.size(), pages: 0, same: 0, chunks: Vec::new() };
    let mut source = Source { memory, buffer: vec![0; CHUNK_LEN] };
    let mut packer = Packer::default();
    for (number, range) in by_chunk(&memory.used_pages()?) {
        let start = u64::from(number) * CHUNK as u64;
        let end = (start + CHUNK as u64).min(memory.size() / PAGE_SIZE);
        let mut whole = vec![0; (end - start) as usize * PAGE];
        let inner = (range.start - start) as usize * PAGE..(range.end - start) as usize * PAGE;
        whole[inner].copy_from_slice(source.read(range));
        if is_zero(&whole) {
            continue;
        }
        state.pages += whole.chunks(PAGE).filter(|page| !is_zero(page)).count() as u64;
        state.chunks.push(match form {
            Form::Flat => flat(file, number, &whole)?,
            Form::Packed => packer.chunk(file, number, &whole, memory)?,
        });
    }
    state.same = packer.same;
    if form == Form::Flat {
        file.set_len(state.size)?;
    }
    Ok(state)
}

fn flat(file: &File, number: u32, whole: &[u8]) -> io::Result<Chunk> {
    let offset = u64::from(number) * CHUNK_LEN as u64;
    let mut at = 0;
    while at < whole.len() {
        let zero = is_zero(&whole[at..at + PAGE]);
        let mut end = at + PAGE;
        while end < whole.len() && is_zero(&whole[end..end + PAGE]) == zero {
            end += PAGE;
        }
        if !zero {
            file.write_all_at(&whole[at..end], offset + at as u64)?;
        }
        at = end;
    }
    Ok(Chunk { number, offset, len: whole.len() as u32, crc: crc32fast::hash(whole) })
}

/// What has been packed.
#[derive(Default)]
struct Packer {
    /// Where the next chunk goes.
    end: u64,
    same: u64,
    /// CRC-32 and length-independent sum of a page to its number. Only a hint: bytes are compared.
    seen: HashMap<u64, u32>,
}

impl Packer {
    fn chunk(&mut self, file: &File, number: u32, whole: &[u8], memory: &GuestMemory) -> io::Result<Chunk> {
        let mut table = Vec::with_capacity(CHUNK);
        let mut data = Vec::with_capacity(whole.len());
        let mut other = vec![0; PAGE];
        for (n, page) in whole.chunks(PAGE).enumerate() {
            let own = number * CHUNK as u32 + n as u32;
            if is_zero(page) {
                table.push(ZERO);
                continue;
            }
            let crc = crc32fast::hash(page);
            let first = u64::from(crc) << 32 | u64::from(crc32fast::hash(&page[..PAGE / 2]));
            let earlier = *self.seen.entry(first).or_insert(own);
            let is_same = earlier != own
                && memory
                    .page_address(earlier.into())
                    .is_some_and(|gpa| memory.read(gpa, &mut other).is_ok())
                && other == page;
            if is_same {
                self.same += 1;
                table.push(SAME + earlier);
            } else {
                table.push(DATA);
                data.extend_from_slice(page);
            }
        }
        let mut raw: Vec<u8> = table.iter().flat_map(|kind| kind.to_le_bytes()).collect();
        raw.extend_from_slice(&data);
        let bytes = zstd::bulk::compress(&raw, LEVEL)?;
        file.write_all_at(&bytes, self.end)?;
        let chunk = Chunk { number, offset: self.end, len: bytes.len() as u32, crc: crc32fast::hash(&bytes) };
        self.end += bytes.len() as u64;
        Ok(chunk)
    }
}

/// What a page is.
enum Page<'a> {
    Data(&'a [u8]),
    /// The same as this one, which came before.
    Same(u64),
}

/// Calls `page` with each page that holds something, in ascending order, after the chunk that it is in was checked.
fn walk(
    state: &ImageState,
    file: &File,
    page: &mut dyn FnMut(u64, Page<'_>) -> Result<(), TransferError>,
) -> Result<(), TransferError> {
    let pages = state.size / PAGE_SIZE;
    for chunk in &state.chunks {
        let damaged = |why: &'static str| TransferError::Damaged { chunk: chunk.number, why };
        let mut bytes = vec![0; chunk.len as usize];
        file.read_exact_at(&mut bytes, chunk.offset).map_err(TransferError::ReadMemory)?;
        if crc32fast::hash(&bytes) != chunk.crc {
            return Err(damaged("the checksum differs"));
        }
        let start = u64::from(chunk.number) * CHUNK as u64;
        let count = (pages - start).min(CHUNK as u64) as usize;
        if state.form == Form::Flat {
            if bytes.len() != count * PAGE {
                return Err(damaged("its length is not possible"));
            }
            for (n, data) in bytes.chunks(PAGE).enumerate().filter(|(_, data)| !is_zero(data)) {
                page(start + n as u64, Page::Data(data))?;
            }
            continue;
        }
        let most = count * (PAGE + 4);
        let raw = zstd::bulk::decompress(&bytes, most).map_err(|_| damaged("it cannot be unpacked"))?;
        let (table, mut data) = raw.split_at_checked(count * 4).ok_or(damaged("its table is cut off"))?;
        for (n, kind) in table.chunks_exact(4).enumerate() {
            let own = start + n as u64;
            match u32::from_le_bytes([kind[0], kind[1], kind[2], kind[3]]) {
                ZERO => {}
                DATA => {
                    let (now, later) = data.split_at_checked(PAGE).ok_or(damaged("its data is cut off"))?;
                    page(own, Page::Data(now))?;
                    data = later;
                }
                same if u64::from(same - SAME) < own => page(own, Page::Same(u64::from(same - SAME)))?,
                _ => return Err(damaged("a page is the same as a later one")),
            }
        }
        if !data.is_empty() {
            return Err(damaged("something follows its data"));
        }
    }
    Ok(())
}

/// Whether the file is what was written.
///
/// # Errors
/// When it is not.
pub fn verify(state: &ImageState, file: &File) -> Result<(), TransferError> {
    state.check(file.metadata().map_err(TransferError::ReadMemory)?.len())?;
    walk(state, file, &mut |_, _| Ok(()))
}

/// How many pages of RAM differ between two images.
///
/// # Errors
/// When one of them is damaged.
pub fn changed(a: &ImageState, a_file: &File, b: &ImageState, b_file: &File) -> Result<u64, TransferError> {
    let (a, b) = (load(a, a_file)?, load(b, b_file)?);
    let pages = a.size().max(b.size()) / PAGE_SIZE;
    let mut count = 0;
    let (mut one, mut other) = (vec![0; PAGE], vec![0; PAGE]);
    for page in 0..pages {
        let read = |memory: &GuestMemory, into: &mut [u8]| {
            memory.page_address(page).is_some_and(|gpa| memory.read(gpa, into).is_ok())
        };
        let there = (read(&a, &mut one), read(&b, &mut other));
        count += u64::from(there != (true, true) || one != other);
    }
    Ok(count)
}

/// RAM as it was, all of it read and checked.
///
/// # Errors
/// When the file is not what was written, or the host has no memory.
pub fn load(state: &ImageState, file: &File) -> Result<GuestMemory, TransferError> {
    state.check(file.metadata().map_err(TransferError::ReadMemory)?.len())?;
    let memory = GuestMemory::new(state.size)?;
    let mut other = vec![0; PAGE];
    walk(state, file, &mut |number, what| {
        let outside = TransferError::Damaged { chunk: (number / CHUNK as u64) as u32, why: "it is no RAM" };
        let Some(gpa) = memory.page_address(number) else { return Err(outside) };
        match what {
            Page::Data(data) => memory.write(gpa, data)?,
            Page::Same(earlier) => {
                let Some(from) = memory.page_address(earlier) else { return Err(outside) };
                memory.read(from, &mut other)?;
                memory.write(gpa, &other)?;
            }
        }
        Ok(())
    })?;
    Ok(memory)
}

/// RAM as it was, read when it is needed and not checked.
///
/// # Errors
/// When the file is packed, or too short.
pub fn map(state: &ImageState, file: File) -> Result<GuestMemory, TransferError> {
    state.check(file.metadata().map_err(TransferError::ReadMemory)?.len())?;
    if state.form != Form::Flat {
        return Err(TransferError::NotFlat);
    }
    Ok(GuestMemory::of_image(state.size, file)?)
}

#[cfg(test)]
mod tests {
    use super::{Form, ImageState, load, map, verify, write};
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use wardian_memory::{Gpa, GuestMemory};

    const SIZE: u64 = 5 << 20 | 0x3000;

    fn ram() -> GuestMemory {
        let memory = GuestMemory::new(SIZE).unwrap();
        memory.write(Gpa(0x1000), &[1; 0x1000]).unwrap();
        memory.write(Gpa(0x5ff0), b"text across the end of a page, of a chunk").unwrap();
        memory.write(Gpa((2 << 20) - 16), b"text across the end of a page, of a chunk").unwrap();
        for page in 0..100 {
            memory.write(Gpa((3 << 20) + page * 0x1000), &[1; 0x1000]).unwrap();
        }
        memory.write(Gpa(SIZE - 1), &[9]).unwrap();
        memory.write(Gpa(0x2000), &[0; 0x2000]).unwrap();
        memory
    }

    fn bytes(memory: &GuestMemory) -> Vec<u8> {
        let mut all = vec![0; memory.size() as usize];
        memory.read(Gpa(0), &mut all).unwrap();
        all
    }

    fn saved(form: Form) -> (GuestMemory, File, ImageState) {
        let (memory, file) = (ram(), tempfile::tempfile().unwrap());
        let state = write(&memory, &file, form).unwrap();
        (memory, file, state)
    }

    #[test]
    fn ram_is_the_same_again() {
        for form in [Form::Flat, Form::Packed] {
            let (memory, file, state) = saved(form);
            assert_eq!(state.pages, 1 + 2 + 2 + 100 + 1, "{form:?}");
            verify(&state, &file).unwrap();
            let again = load(&state, &file).unwrap();
            assert!(bytes(&again) == bytes(&memory), "{form:?}");
        }
    }

    #[test]
    fn zeros_and_what_is_there_twice_take_no_room() {
        let (_, file, state) = saved(Form::Packed);
        // Those of ones, and the two halves of the text.
        assert_eq!(state.same, 102);
        assert!(file.metadata().unwrap().len() < 2000);
        let (_, file, _) = saved(Form::Flat);
        let kept = file.metadata().unwrap().blocks() * 512;
        assert!(kept < 110 * 4096, "{kept} bytes");
    }

    #[test]
    fn a_flat_file_is_mapped_and_stays_as_it_is() {
        let (memory, file, state) = saved(Form::Flat);
        let lazy = map(&state, file.try_clone().unwrap()).unwrap();
        assert!(bytes(&lazy) == bytes(&memory));
        lazy.write(Gpa(0x1000), &[7; 64]).unwrap();
        verify(&state, &file).unwrap();
        // And what is saved of it holds what was written since.
        let second = tempfile::tempfile().unwrap();
        let state = write(&lazy, &second, Form::Packed).unwrap();
        assert!(bytes(&load(&state, &second).unwrap()) == bytes(&lazy));
        let (_, file, state) = saved(Form::Packed);
        assert!(map(&state, file).is_err());
    }

    #[test]
    fn damage_is_found() {
        for form in [Form::Flat, Form::Packed] {
            let (_, file, state) = saved(form);
            let middle = state.chunks[1].offset + u64::from(state.chunks[1].len) - 1;
            let mut byte = [0];
            file.read_exact_at(&mut byte, middle).unwrap();
            file.write_all_at(&[byte[0] ^ 1], middle).unwrap();
            let error = verify(&state, &file).unwrap_err().to_string();
            assert!(error.contains("chunk 1"), "{form:?}: {error}");
            load(&state, &file).unwrap_err();
            file.set_len(4096).unwrap();
            verify(&state, &file).unwrap_err();
        }
    }

    #[test]
    fn hostile_chunks_are_refused_or_harmless() {
        let (_, file, good) = saved(Form::Packed);
        let mut seed = 0x1234_5678_9abc_def1u64;
        let mut next = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        // Packed bytes that are wrong under a right checksum.
        for _ in 0..500 {
            let mut state = good.clone();
            let at = next() as usize % state.chunks.len();
            let chunk = &mut state.chunks[at];
            let mut raw = vec![0; chunk.len as usize];
            file.read_exact_at(&mut raw, chunk.offset).unwrap();
            let place = next() as usize % raw.len();
            raw[place] = next() as u8;
            let bad = tempfile::tempfile().unwrap();
            bad.write_all_at(&raw, chunk.offset).unwrap();
            bad.set_len(file.metadata().unwrap().len()).unwrap();
            chunk.crc = crc32fast::hash(&raw);
            state.chunks = vec![state.chunks[at]];
            let _ = load(&state, &bad);
        }
        let len = file.metadata().unwrap().len();
        let refused = |change: &dyn Fn(&mut ImageState)| {
            let mut state = good.clone();
            change(&mut state);
            state.check(len).unwrap_err();
        };
        refused(&|s| s.size = 1 << 50);
        refused(&|s| s.size = 0);
        refused(&|s| s.size = 4097);
        refused(&|s| s.form = Form::Flat);
        refused(&|s| s.chunks[0].offset = u64::MAX);
        refused(&|s| s.chunks[0].len = u32::MAX);
        refused(&|s| s.chunks[0].number = 6);
        refused(&|s| s.chunks.swap(0, 1));
    }

    #[test]
    fn chunks_of_random_ram() {
        // Sizes that are no multiple of a chunk, and RAM above the hole.
        let memory = GuestMemory::new(wardian_memory::LOW_RAM_END + 0x5000).unwrap();
        memory.write(Gpa(wardian_memory::LOW_RAM_END - 5), b"below").unwrap();
        memory.write(Gpa(wardian_memory::HIGH_RAM_START), b"above").unwrap();
        memory.write(Gpa(wardian_memory::HIGH_RAM_START + 0x4ffd), b"end").unwrap();
        for form in [Form::Flat, Form::Packed] {
            let file = tempfile::tempfile().unwrap();
            let state = write(&memory, &file, form).unwrap();
            assert_eq!(state.pages, 3);
            let again = load(&state, &file).unwrap();
            let mut text = [0; 5];
            again.read(Gpa(wardian_memory::HIGH_RAM_START), &mut text).unwrap();
            assert_eq!(&text, b"above");
            again.read(Gpa(wardian_memory::LOW_RAM_END - 5), &mut text).unwrap();
            assert_eq!(&text, b"below");
            again.read(Gpa(wardian_memory::HIGH_RAM_START + 0x4ffb), &mut text).unwrap();
            assert_eq!(&text, b"\0\0end");
        }
    }
}
