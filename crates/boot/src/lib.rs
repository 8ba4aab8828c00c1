//! Kernels, initial RAM disks, modules and command lines into guest memory.
//!
//! *Comes in*: [`GuestMemory`] and a [`BootRequest`] with paths. *Goes out*: guest memory as the kernel's boot
//! protocol wants it and the [`CpuState`] in which the first vCPU enters the kernel.
//!
//! Three protocols, told apart by the file itself: multiboot 1 (header in the first 8 KiB), PVH (an ELF file
//! with the Xen note), Linux bzImage by its 64-bit protocol.
//!
//! **Architecture Invariant:** files are hostile. Every offset, size and address out of one is checked; a
//! garbled file is an error value, never a panic and never more work than its size warrants.
//! **Architecture Invariant:** what a loader builds for the kernel lies in low RAM (below 640 KiB), what the
//! kernel brings lies at 1 MiB or above; the two never meet.
//!
//! **API Boundary:** [`load`], [`BootRequest`], [`BootError`], [`memory_map`], [`is_multiboot`].
#![forbid(unsafe_code)]

mod bzimage;
mod elf;
mod entry;
mod low;
mod map;
mod multiboot;
mod place;
mod pvh;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use wardian_cpu::CpuState;
use wardian_memory::{GuestMemory, MemoryError};

pub use map::{MapEntry, MapKind, memory_map};

/// What to boot.
#[derive(Clone, Debug, Default)]
pub struct BootRequest {
    /// Kernel file: bzImage, ELF with a PVH note, or multiboot 1.
    pub kernel: PathBuf,
    /// Initial RAM disk; the first module for multiboot.
    pub initrd: Option<PathBuf>,
    /// Kernel command line, without a terminating NUL.
    pub cmdline: String,
    /// Modules (multiboot, PVH) with their own command lines.
    pub modules: Vec<(PathBuf, String)>,
    /// Where the ACPI root pointer lies, if the kernel shall be told.
    pub acpi_rsdp: Option<u64>,
    /// Address ranges that the memory map shall name as reserved, such as the PCI ECAM window.
    pub reserved: Vec<Range<u64>>,
}

/// Why there is nothing to run.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file is missing or unreadable.
    #[error("Cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The file ends before something that it promises.
    #[error("{path} is truncated: {what} needs {need} bytes, the file has {have}")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The part that is cut off.
        what: &'static str,
        /// Length that the file should have at least.
        need: u64,
        /// Length that it has.
        have: u64,
    },
    /// Neither bzImage nor ELF nor multiboot.
    #[error("{path} is no kernel: neither bzImage nor ELF nor multiboot")]
    NotAKernel {
        /// The file.
        path: PathBuf,
    },
    /// A kernel for another architecture.
    #[error("{path} is a kernel for {machine}, not for x86-64")]
    WrongMachine {
        /// The file.
        path: PathBuf,
        /// Whose kernel it is.
        machine: String,
    },
    /// A kernel that cannot be entered in a way offered here.
    #[error("{path} cannot be booted: {what}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What is missing.
        what: String,
    },
    /// The file contradicts itself.
    #[error("{path} is garbled: {what}")]
    Garbled {
        /// The file.
        path: PathBuf,
        /// The field and its value.
        what: String,
    },
    /// The initial RAM disk (or a module) does not fit beside the kernel.
    #[error("{path} of {size} bytes does not fit into guest memory: {room} bytes are free beside the kernel")]
    InitrdTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// Bytes that are free.
        room: u64,
    },
    /// The kernel does not fit.
    #[error("Guest memory is too small: the kernel needs RAM up to {need:#x}, there is RAM up to {have:#x}")]
    MemoryTooSmall {
        /// First address that the kernel does not need.
        need: u64,
        /// End of low RAM.
        have: u64,
    },
    /// The kernel cannot take a command line of that length.
    #[error("The kernel command line has {len} bytes, this kernel takes {max}")]
    CommandLineTooLong {
        /// Its length in bytes.
        len: usize,
        /// The most that the kernel takes.
        max: usize,
    },
    /// A command line with a NUL byte.
    #[error("A command line holds a NUL byte")]
    CommandLineNul,
    /// Modules or their command lines need more than the room kept for them.
    #[error("Too many modules, or too long command lines, for the boot information: {need} bytes do not fit")]
    TooMuchInformation {
        /// Bytes asked for.
        need: u64,
    },
    /// A write beside RAM: a bug in this crate.
    #[error("Could not write boot data")]
    Memory(#[from] MemoryError),
}

/// The most that is read of a kernel file. An ELF kernel with debug information stays below it.
const KERNEL_FILE_MAX: u64 = 2 << 30;

/// A kernel file in host memory.
pub(crate) struct Image {
    pub path: PathBuf,
    pub bytes: Vec<u8>,
}

impl Image {
    fn read(path: &Path) -> Result<Image, BootError> {
        let (file, size) = open(path)?;
        if size > KERNEL_FILE_MAX {
            return Err(BootError::Unsupported {
                path: path.to_path_buf(),
                what: format!("{size} bytes are more than any kernel has"),
            });
        }
        let mut bytes = Vec::new();
        file.take(KERNEL_FILE_MAX)
            .read_to_end(&mut bytes)
            .map_err(|source| BootError::Read { path: path.to_path_buf(), source })?;
        Ok(Image { path: path.to_path_buf(), bytes })
    }

    /// `len` bytes at `at`, or the error that names `what`.
    fn slice(&self, at: u64, len: u64, what: &'static str) -> Result<&[u8], BootError> {
        let have = self.bytes.len() as u64;
        match at.checked_add(len) {
            Some(end) if end <= have => Ok(&self.bytes[at as usize..end as usize]),
            end => Err(BootError::Truncated {
                path: self.path.clone(),
                what,
                need: end.unwrap_or(u64::MAX),
                have,
            }),
        }
    }

    fn u16(&self, at: u64, what: &'static str) -> Result<u16, BootError> {
        self.slice(at, 2, what).map(|b| u16::from_le_bytes([b[0], b[1]]))
    }

    fn u32(&self, at: u64, what: &'static str) -> Result<u32, BootError> {
        self.slice(at, 4, what).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn garbled(&self, what: String) -> BootError {
        BootError::Garbled { path: self.path.clone(), what }
    }

    fn unsupported(&self, what: impl Into<String>) -> BootError {
        BootError::Unsupported { path: self.path.clone(), what: what.into() }
    }
}

/// Opens a regular file and tells its size.
fn open(path: &Path) -> Result<(File, u64), BootError> {
    let error = |source| BootError::Read { path: path.to_path_buf(), source };
    let meta = std::fs::metadata(path).map_err(error)?;
    if !meta.is_file() {
        return Err(error(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let file = File::open(path).map_err(error)?;
    Ok((file, meta.len()))
}

/// Whether `kernel` is one of multiboot 1: a small kernel of its own kind, mostly, and no stock one.
#[must_use]
pub fn is_multiboot(kernel: &Path) -> bool {
    let mut bytes = Vec::new();
    let read = open(kernel).and_then(|(file, _)| {
        file.take(8192)
            .read_to_end(&mut bytes)
            .map_err(|source| BootError::Read { path: kernel.to_path_buf(), source })
    });
    read.is_ok() && multiboot::find(&Image { path: kernel.to_path_buf(), bytes }).is_some()
}

/// Loads what `request` names into `mem` and returns the state in which the first vCPU starts.
///
/// Everything is checked before guest memory is written, save for sizes of files that change meanwhile.
///
/// # Errors
/// Each way in which a request can be wrong has its own [`BootError`].
pub fn load(mem: &GuestMemory, request: &BootRequest) -> Result<CpuState, BootError> {
    if request.cmdline.contains('\0') || request.modules.iter().any(|(_, text)| text.contains('\0')) {
        return Err(BootError::CommandLineNul);
    }
    load_image(mem, request, &Image::read(&request.kernel)?)
}

fn load_image(mem: &GuestMemory, request: &BootRequest, image: &Image) -> Result<CpuState, BootError> {
    let low_end = place::low_end(mem);
    if low_end < 2 << 20 {
        return Err(BootError::MemoryTooSmall { need: 2 << 20, have: low_end });
    }
    image.slice(0, 1, "The kernel")?;
    let elf = elf::Elf::parse(image)?;
    if let Some(header) = multiboot::find(image) {
        return multiboot::load(mem, request, image, &header, elf.as_ref());
    }
    match elf {
        Some(elf) => pvh::load(mem, request, image, &elf),
        None => bzimage::load(mem, request, image),
    }
}
