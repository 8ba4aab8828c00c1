//! Guest RAM as a reader sees it: [`Physical`], and a file of it ([`Ram`]).

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek};
use serde::{Deserialize, Serialize};

/// Read-only guest RAM. What is read may change meanwhile: nothing is taken for granted twice.
pub trait Physical: Send + Sync {
    /// Reads `out.len()` bytes at the guest physical address; says whether all of them are RAM.
    #[must_use]
    fn read(&self, gpa: u64, out: &mut [u8]) -> bool;

    /// The address ranges that may hold something other than zero, ascending.
    fn data(&self) -> Vec<Range<u64>>;
}

/// A piece of RAM and where it lies in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Offset in the file.
    pub offset: u64,
}

/// RAM in a file: the memfd of a machine that runs, or what was saved of one.
#[derive(Clone, Debug)]
pub struct Ram {
    file: Arc<File>,
    regions: Vec<Region>,
}

/// Most holes of a file that are looked for.
const MAX_EXTENTS: usize = 1 << 16;

impl Ram {
    /// The regions of `file`. Those that make no sense are left out.
    #[must_use]
    pub fn new(file: Arc<File>, regions: impl IntoIterator<Item = Region>) -> Ram {
        let fits = |r: &Region| r.gpa.checked_add(r.size).is_some() && r.offset.checked_add(r.size).is_some();
        let mut regions: Vec<Region> = regions.into_iter().filter(fits).collect();
        regions.sort_by_key(|region| region.gpa);
        Ram { file, regions }
    }

    /// Where RAM lies.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The parts of `region` that are no holes of the file.
    fn extents(&self, region: &Region, out: &mut Vec<Range<u64>>) {
        let (mut at, end) = (region.offset, region.offset + region.size);
        while at < end && out.len() < MAX_EXTENTS {
            let Ok(start) = seek(&*self.file, SeekFrom::Data(at)) else { break };
            let Ok(stop) = seek(&*self.file, SeekFrom::Hole(start)) else { break };
            let (start, stop) = (start.max(at), stop.min(end));
            if start >= stop {
                break;
            }
            out.push(region.gpa + (start - region.offset)..region.gpa + (stop - region.offset));
            at = stop;
        }
    }
}

impl Physical for Ram {
    fn read(&self, gpa: u64, out: &mut [u8]) -> bool {
        let holds = |r: &&Region| {
            gpa.checked_sub(r.gpa).is_some_and(|at| at < r.size && out.len() as u64 <= r.size - at)
        };
        let Some(region) = self.regions.iter().find(holds) else { return false };
        self.file.read_exact_at(out, region.offset + (gpa - region.gpa)).is_ok()
    }

    fn data(&self) -> Vec<Range<u64>> {
        let mut all = Vec::new();
        for region in &self.regions {
            self.extents(region, &mut all);
        }
        if all.is_empty() {
            // A file system without holes says nothing: all of it, then.
            return self.regions.iter().map(|r| r.gpa..r.gpa + r.size).collect();
        }
        all
    }
}

/// RAM in a vector, from address 0: for tests.
impl Physical for Vec<u8> {
    fn read(&self, gpa: u64, out: &mut [u8]) -> bool {
        let Some(from) = usize::try_from(gpa).ok().and_then(|at| self.get(at..)?.get(..out.len())) else {
            return false;
        };
        out.copy_from_slice(from);
        true
    }

    fn data(&self) -> Vec<Range<u64>> {
        std::iter::once(0..self.len() as u64).collect()
    }
}
