//! [`Program`]: a process's binaries; names of its code and its stacks.

use std::sync::Arc;

use framehop::x86_64::{CacheX86_64, Reg, UnwindRegsX86_64, UnwinderX86_64};
use framehop::{ExplicitModuleSectionInfo, FrameAddress, Module, Unwinder};

use crate::elf::Image;
use crate::orc::{Address, MAX_FRAMES, Start};
use crate::pagecache::Sparse;
use crate::{Area, Space, View};

/// Most binaries of a process.
const MAX_BINARIES: usize = 1024;
const MAX_VDSO: u64 = 64 << 10;
/// Most bytes of files that are read for one process.
const MAX_READ: u64 = 512 << 20;

/// A binary where a process has it.
struct Loaded {
    start: u64,
    end: u64,
    offset: u64,
    /// What is added to the file's addresses.
    bias: u64,
    path: String,
    image: Option<Arc<Image>>,
}

/// A name of user code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserName {
    /// Path of the binary, or `[vdso]`, or `[anon]`.
    pub object: String,
    /// Offset in it.
    pub object_offset: u64,
    /// Name of the function and offset behind its beginning.
    pub symbol: Option<(String, u64)>,
}

/// An executable mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address behind it.
    pub end: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Path of the file, `[vdso]`, or nothing.
    pub path: String,
    /// Build-id of the file; empty if it is not known.
    pub build_id: Vec<u8>,
}

/// A process's code, read once.
pub struct Program {
    loaded: Vec<Loaded>,
    unwinder: UnwinderX86_64<Arc<[u8]>>,
    cache: CacheX86_64,
}

impl View<'_> {
    /// The code of the process whose `mm_struct` is at `mm`.
    #[must_use]
    pub fn program_of(&self, mm: u64) -> Option<Program> {
        let space = self.user_space(mm)?;
        let mut unwinder = UnwinderX86_64::new();
        let mut loaded = Vec::new();
        let mut left = MAX_READ;
        for area in self.areas(mm).into_iter().filter(Area::executable).take(MAX_BINARIES) {
            let image = self.image(&space, &area, &mut left);
            let bias = image.as_ref().and_then(|image| image.bias(area.start, area.offset));
            if let (Some(image), Some(bias)) = (&image, bias) {
                unwinder.add_module(module(&area, image, bias));
            }
            loaded.push(Loaded {
                start: area.start,
                end: area.end,
                offset: area.offset,
                bias: bias.unwrap_or(0),
                image: image.filter(|_| bias.is_some()),
                path: area.name,
            });
        }
        Some(Program { loaded, unwinder, cache: CacheX86_64::new() })
    }

    /// The binary behind an area.
    fn image(&self, space: &Space<'_>, area: &Area, left: &mut u64) -> Option<Arc<Image>> {
        if area.name == "[vdso]" {
            let size = area.end - area.start;
            let bytes = || space.bytes(area.start, size, MAX_VDSO as usize);
            let key = format!("[vdso] {size}");
            return self.kernel.binaries.find(&key).unwrap_or_else(|| {
                self.keep(key, bytes().map(Sparse::whole).and_then(|file| Image::parse(&file)))
            });
        }
        let file = area.file.as_ref()?;
        let size = self.file_size(file.address)?;
        let key = format!("{:?} {} {size} {}", file.device, file.inode, area.name);
        self.kernel.binaries.find(&key).unwrap_or_else(|| {
            *left = left.checked_sub(size)?;
            let content = self.file_content(file.address, &area.name);
            self.keep(key, content.and_then(|content| Image::parse(&content)))
        })
    }
}

fn module(area: &Area, image: &Image, bias: u64) -> Module<Arc<[u8]>> {
    let section = |section: &Option<crate::elf::Section>| match section {
        Some((range, bytes)) => (Some(range.clone()), Some(Arc::clone(bytes))),
        None => (None, None),
    };
    let (eh_frame_svma, eh_frame) = section(&image.eh_frame);
    let (eh_frame_hdr_svma, eh_frame_hdr) = section(&image.eh_frame_hdr);
    let info = ExplicitModuleSectionInfo {
        base_svma: 0,
        text_svma: image.text(),
        eh_frame_svma,
        eh_frame,
        eh_frame_hdr_svma,
        eh_frame_hdr,
        ..ExplicitModuleSectionInfo::default()
    };
    Module::new(area.name.clone(), area.start..area.end, bias, info)
}

impl Program {
    fn at(&self, ip: u64) -> Option<&Loaded> {
        self.loaded.iter().find(|loaded| (loaded.start..loaded.end).contains(&ip))
    }

    /// What code is at `address`; `None` if nothing that may be executed is.
    #[must_use]
    pub fn name(&self, address: u64) -> Option<UserName> {
        let loaded = self.at(address)?;
        let symbol = loaded.image.as_ref().and_then(|image| {
            let (symbol, offset) = image.symbols.code(address.wrapping_sub(loaded.bias))?;
            Some((symbol.name.to_owned(), offset))
        });
        let object = if loaded.path.is_empty() { "[anon]".to_owned() } else { loaded.path.clone() };
        Some(UserName { object, object_offset: (address - loaded.start).wrapping_add(loaded.offset), symbol })
    }

    /// What may be executed.
    pub fn mappings(&self) -> impl Iterator<Item = Mapping> {
        self.loaded.iter().map(|loaded| Mapping {
            start: loaded.start,
            end: loaded.end,
            offset: loaded.offset,
            path: loaded.path.clone(),
            build_id: loaded.image.as_ref().map(|image| image.build_id.clone()).unwrap_or_default(),
        })
    }

    /// Whether something that may be executed is at `address`.
    #[must_use]
    pub fn holds(&self, address: u64) -> bool {
        self.at(address).is_some()
    }

    /// Walks a user stack in the process's `space`: by `.eh_frame` where there is one, by frame pointers elsewhere.
    #[must_use]
    pub fn stack(&mut self, space: &Space<'_>, start: Start) -> Vec<Address> {
        let mut frames = Vec::new();
        let mut registers = UnwindRegsX86_64::new(start.ip, start.sp, start.bp);
        if let Some([rdx, rdi, r10, r13]) = start.others {
            for (register, value) in [(Reg::RDX, rdx), (Reg::RDI, rdi), (Reg::R10, r10), (Reg::R13, r13)] {
                registers.set(register, value);
            }
        }
        let (mut address, mut exact) = (FrameAddress::from_instruction_pointer(start.ip), true);
        while frames.len() < MAX_FRAMES {
            let ip = address.address();
            let at = if exact { ip } else { ip.wrapping_sub(1) };
            if self.at(at).is_none() {
                // A jump to nowhere is worth showing; a return address that is none ends the walk.
                if exact {
                    frames.push(Address { ip, exact });
                }
                break;
            }
            frames.push(Address { ip, exact });
            let mut read = |at: u64| space.u64(at).ok_or(());
            let before = registers.sp();
            match self.unwinder.unwind_frame(address, &mut registers, &mut self.cache, &mut read) {
                Ok(Some(next)) => {
                    let Some(next) = FrameAddress::from_return_address(next) else { break };
                    if registers.sp() <= before && !exact {
                        break;
                    }
                    (address, exact) = (next, false);
                }
                _ => break,
            }
        }
        frames
    }
}
