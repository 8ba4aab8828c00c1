//! A machine written down for a reader: RAM and registers in a directory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek};
use serde::{Deserialize, Serialize};

use crate::{Error, Ram, Region, Registers};

const MEMORY: &str = "memory";
const MACHINE: &str = "machine.json";
const PIECE: usize = 1 << 20;

#[derive(Serialize, Deserialize)]
struct Written {
    regions: Vec<Region>,
    vcpus: Vec<Registers>,
}

/// RAM and registers of a machine that stood still.
#[derive(Debug)]
pub struct Dump {
    /// RAM.
    pub ram: Ram,
    /// Each vCPU.
    pub vcpus: Vec<Registers>,
}

impl Dump {
    /// Reads what [`Dump::write`] wrote.
    ///
    /// # Errors
    /// When it cannot be read or is something else.
    pub fn open(directory: &Path) -> Result<Dump, Error> {
        let path = directory.join(MACHINE);
        let text = std::fs::read(&path).map_err(Error::reading(&path))?;
        let written: Written = serde_json::from_slice(&text).map_err(|e| Error::reading(&path)(e.into()))?;
        let path = directory.join(MEMORY);
        let file = File::open(&path).map_err(Error::reading(&path))?;
        Ok(Dump { ram: Ram::new(Arc::new(file), written.regions), vcpus: written.vcpus })
    }

    /// Writes a machine's RAM, out of `file`, and registers to `directory`, which is there.
    ///
    /// # Errors
    /// When the file system does not take it.
    pub fn write(
        directory: &Path,
        file: &File,
        regions: impl IntoIterator<Item = (u64, u64, u64)>,
        vcpus: Vec<Registers>,
    ) -> Result<(), Error> {
        let regions: Vec<Region> =
            regions.into_iter().map(|(gpa, size, offset)| Region { gpa, size, offset }).collect();
        let path = directory.join(MEMORY);
        let size = regions.iter().map(|region| region.offset + region.size).max().unwrap_or(0);
        copy(file, &path, size).map_err(|source| Error::Write { path: path.clone(), source })?;
        let path = directory.join(MACHINE);
        let error = |source| Error::Write { path: path.clone(), source };
        let text = serde_json::to_vec_pretty(&Written { regions, vcpus }).map_err(|e| error(e.into()))?;
        std::fs::write(&path, text).map_err(error)
    }
}

/// Copies what is not a hole.
fn copy(from: &File, path: &Path, size: u64) -> std::io::Result<()> {
    let to = File::create(path)?;
    to.set_len(size)?;
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < size {
        let Ok(start) = seek(from, SeekFrom::Data(at)) else { break };
        let end = seek(from, SeekFrom::Hole(start))?.min(size);
        at = start;
        while at < end {
            let len = ((end - at) as usize).min(PIECE);
            from.read_exact_at(&mut piece[..len], at)?;
            to.write_all_at(&piece[..len], at)?;
            at += len as u64;
        }
    }
    Ok(())
}
