//! [`Kernel`]: a guest's kernel, found and understood once; [`View`]: one look at the guest through it.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use crate::elf::{Binaries, Image};
use crate::layout::Layout;
use crate::modules::Module;
use crate::orc::Orc;
use crate::{Error, Physical, Registers, Space, Stretch, Symbols, Types, VmCoreInfo, kallsyms};

/// Where Linux maps its image (Linux, Documentation/arch/x86/x86_64/mm.rst).
const IMAGE_START: u64 = 0xffff_ffff_8000_0000;
const IMAGE_END: u64 = 0xffff_ffff_c000_0000;
/// The kernel half of the address space.
pub(crate) const KERNEL_HALF: u64 = 0xffff_8000_0000_0000;
const MAX_STRETCHES: usize = 4096;
/// Most pages that look like VMCOREINFO and fit that are tried.
const MAX_INFOS: usize = 4;
const MAX_BTF: u64 = 64 << 20;
const CR3_USER: u64 = 1 << 12;
const PAGE_FAULT: u64 = 14;
/// Entry of the page fault handler, old and new.
const PAGE_FAULT_NAMES: &[&str] = &["asm_exc_page_fault", "page_fault"];

/// A Linux kernel in a guest: its names, its types, where its tables are. None of that changes while it runs.
pub struct Kernel {
    root: u64,
    levels: u8,
    release: String,
    build_id: Vec<u8>,
    pub(crate) info: VmCoreInfo,
    symbols: Symbols,
    types: Option<Types>,
    pub(crate) layout: Layout,
    image: Vec<Stretch>,
    /// Added to the place of a per-CPU variable in its section.
    percpu: u64,
    pub(crate) orc: OnceLock<Option<Orc>>,
    /// Modules that were read, by the address of their structure.
    pub(crate) modules: Mutex<HashMap<u64, Arc<Module>>>,
    pub(crate) binaries: Binaries,
}

impl Kernel {
    /// Finds the kernel that the vCPUs run.
    ///
    /// # Errors
    /// [`Error::NoKernel`] before there is one, [`Error::NotFound`] when it is none that can be read.
    pub fn find(memory: &dyn Physical, vcpus: &[Registers]) -> Result<Kernel, Error> {
        let mut first = None;
        for vcpu in vcpus {
            match Kernel::find_by(memory, vcpu) {
                Ok(kernel) => return Ok(kernel),
                Err(error) => first = first.or(Some(error)),
            }
        }
        Err(first.unwrap_or(Error::NoKernel))
    }

    fn find_by(memory: &dyn Physical, vcpu: &Registers) -> Result<Kernel, Error> {
        let levels = vcpu.levels().ok_or(Error::NoKernel)?;
        let (space, handler) = kernel_space(memory, vcpu, levels).ok_or(Error::NoKernel)?;
        let mut known: Vec<(u64, &[&str])> = Vec::new();
        if vcpu.lstar >= IMAGE_START {
            known.push((vcpu.lstar, &["entry_SYSCALL_64"]));
        }
        known.extend(handler.map(|at| (at, PAGE_FAULT_NAMES)));
        let image = space.mapped(IMAGE_START, IMAGE_END, MAX_STRETCHES);
        let text = known.first().ok_or(Error::NoKernel)?.0;
        // A process may write down a page that looks like VMCOREINFO: only one that fits counts.
        let infos = VmCoreInfo::find(memory);
        let fits = |info: &&VmCoreInfo| {
            info.symbol("_stext").is_some_and(|start| start <= text && text - start < 1 << 30)
        };
        let mut symbols = None;
        let mut info = None;
        for candidate in infos.iter().filter(fits).take(MAX_INFOS) {
            symbols = kallsyms::by_info(&space, candidate, &known);
            info = Some(candidate);
            if symbols.is_some() {
                break;
            }
        }
        let info = info.cloned().unwrap_or_default();
        let symbols = symbols
            .or_else(|| kallsyms::by_search(&space, &image, &known))
            .ok_or(Error::NotFound("its symbol table"))?;
        // The kernel's own tables outlive those of the process that runs now.
        let own = ["swapper_pg_dir", "init_top_pgt"]
            .iter()
            .find_map(|name| symbols.address(name).or_else(|| info.symbol(name)))
            .and_then(|at| space.translate(at))
            .map(|root| space.with_root(root))
            .filter(|own| own.translate(text) == space.translate(text));
        let space = own.unwrap_or(space);
        let types = types(&space, &symbols, &image);
        let percpu = symbols.address("__per_cpu_start").filter(|at| *at >= IMAGE_START).unwrap_or(0);
        let release = info.release().map(str::to_owned).or_else(|| release(&space, &symbols, &image));
        Ok(Kernel {
            root: space.root(),
            levels,
            release: release.unwrap_or_else(|| "unknown".to_owned()),
            build_id: info.build_id().or_else(|| build_id(&space, &symbols)).unwrap_or_default(),
            layout: Layout::new(types.as_ref(), &info),
            info,
            symbols,
            types,
            image,
            percpu,
            orc: OnceLock::new(),
            modules: Mutex::default(),
            binaries: Binaries::default(),
        })
    }

    /// Release, as uname(1) has it.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Build-id; empty if it is not known.
    #[must_use]
    pub fn build_id(&self) -> &[u8] {
        &self.build_id
    }

    /// Its names, without those of modules.
    #[must_use]
    pub fn symbols(&self) -> &Symbols {
        &self.symbols
    }

    /// Its types.
    #[must_use]
    pub fn types(&self) -> Option<&Types> {
        self.types.as_ref()
    }

    /// What its image maps, as it was found.
    #[must_use]
    pub fn image(&self) -> &[Stretch] {
        &self.image
    }

    /// One look at the guest, whose vCPUs are as given.
    #[must_use]
    pub fn view<'a>(&'a self, memory: &'a dyn Physical, vcpus: &'a [Registers]) -> View<'a> {
        View {
            kernel: self,
            space: Space::new(memory, self.root, self.levels),
            vcpus,
            files: None,
            modules: OnceCell::new(),
        }
    }

    /// Place of a per-CPU variable, to be added to the base of a CPU.
    pub(crate) fn percpu_place(&self, name: &str) -> Option<u64> {
        self.symbols
            .address(name)
            .or_else(|| Some(self.types.as_ref()?.percpu(name)?.0.wrapping_add(self.percpu)))
    }
}

/// Access to files of the guest by other ways than its memory: a disk image.
pub trait Files: Send + Sync {
    /// The bytes of the file at `path`; `None` if it is not there or larger than `most`.
    fn read(&self, path: &str, most: usize) -> Option<Vec<u8>>;
}

/// One look at a guest. Make it anew when the guest has run on.
pub struct View<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) space: Space<'a>,
    pub(crate) vcpus: &'a [Registers],
    pub(crate) files: Option<&'a dyn Files>,
    modules: OnceCell<Vec<Arc<Module>>>,
}

impl<'a> View<'a> {
    /// Where files may be read from that are not in the guest's memory.
    #[must_use]
    pub fn with_files(mut self, files: Option<&'a dyn Files>) -> View<'a> {
        self.files = files;
        self
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> &'a Kernel {
        self.kernel
    }

    /// The kernel's address space.
    #[must_use]
    pub fn space(&self) -> &Space<'a> {
        &self.space
    }

    /// The vCPUs' registers.
    #[must_use]
    pub fn vcpus(&self) -> &'a [Registers] {
        self.vcpus
    }

    /// The modules that are loaded.
    #[must_use]
    pub fn modules(&self) -> &[Arc<Module>] {
        self.modules.get_or_init(|| self.read_modules())
    }

    /// Base of the per-CPU variables of the CPU that a vCPU is.
    #[must_use]
    pub fn percpu_base(&self, vcpu: &Registers) -> Option<u64> {
        let (likely, other) = if vcpu.user() {
            (vcpu.kernel_gs_base, vcpu.gs_base)
        } else {
            (vcpu.gs_base, vcpu.kernel_gs_base)
        };
        // A user program can set its GS base to any address: the CPU's own note of its base decides.
        let own = self.kernel.percpu_place("this_cpu_off");
        let right = |base: &u64| {
            *base >= KERNEL_HALF
                && own.is_none_or(|place| self.space.u64(base.wrapping_add(place)) == Some(*base))
        };
        [likely, other].into_iter().find(right)
    }

    /// Value of a pointer-sized per-CPU variable.
    pub(crate) fn percpu_u64(&self, vcpu: &Registers, name: &str) -> Option<u64> {
        let place = self.kernel.percpu_place(name)?;
        self.space.u64(self.percpu_base(vcpu)?.wrapping_add(place))
    }

    /// A loaded binary of the kernel's user space, if `image` is one.
    pub(crate) fn keep(&self, key: String, image: Option<Image>) -> Option<Arc<Image>> {
        self.kernel.binaries.keep(key, image)
    }
}

/// The space in which the kernel itself is mapped, and where page faults go.
fn kernel_space<'m>(
    memory: &'m dyn Physical,
    vcpu: &Registers,
    levels: u8,
) -> Option<(Space<'m>, Option<u64>)> {
    // With page table isolation the tables of user mode are the page behind the kernel's.
    let roots = [vcpu.cr3 & !CR3_USER, vcpu.cr3];
    let spaces = roots.iter().map(|root| {
        let space = Space::new(memory, *root, levels);
        let handler = gate(&space, vcpu.idt, PAGE_FAULT).filter(|at| *at >= IMAGE_START);
        let seen = [Some(vcpu.lstar).filter(|at| *at >= IMAGE_START), handler];
        let mapped = seen.iter().flatten().filter(|at| space.translate(**at).is_some()).count();
        // User tables have the entry code alone.
        let weight = if mapped == 0 {
            0
        } else {
            space.mapped(IMAGE_START, IMAGE_END, 64).iter().map(|s| s.end - s.start).sum()
        };
        (weight, space, handler)
    });
    let (weight, space, handler) = spaces.max_by_key(|(weight, ..)| *weight)?;
    (weight > 1 << 20).then_some((space, handler))
}

/// Where an interrupt gate leads (Intel SDM vol. 3A, figure 6-8).
fn gate(space: &Space<'_>, idt: u64, vector: u64) -> Option<u64> {
    let low = space.u64(idt.checked_add(vector * 16)?)?;
    let high = space.u64(idt + vector * 16 + 8)?;
    (low >> 47 & 1 == 1).then_some(low & 0xffff | low >> 32 & 0xffff_0000 | high << 32)
}

fn types(space: &Space<'_>, symbols: &Symbols, image: &[Stretch]) -> Option<Types> {
    if let (Some(start), Some(end)) = (symbols.address("__start_BTF"), symbols.address("__stop_BTF"))
        && let Some(data) = space.bytes(start, end.saturating_sub(start), MAX_BTF as usize)
        && let Some(types) = Types::parse(data)
    {
        return Some(types);
    }
    // Version 1, flags 0, header of 24 bytes.
    let head = [0x9f, 0xeb, 1, 0, 24, 0, 0, 0];
    for stretch in image.iter().filter(|stretch| !stretch.executable) {
        let mut at = stretch.start;
        while at + 4096 <= stretch.end {
            let page = space.bytes(at, 4096, 4096)?;
            for offset in (0..4096).step_by(4).filter(|offset| page[*offset..].starts_with(&head)) {
                let start = at + offset as u64;
                let (Some(strings), Some(len)) = (space.u32(start + 16), space.u32(start + 20)) else {
                    continue;
                };
                let size = 24 + u64::from(strings) + u64::from(len);
                if !(1 << 16..=MAX_BTF).contains(&size) {
                    continue;
                }
                let parsed = space.bytes(start, size, MAX_BTF as usize).and_then(Types::parse);
                if let Some(types) = parsed.filter(|types| types.size("task_struct").is_some()) {
                    return Some(types);
                }
            }
            at += 4096;
        }
    }
    None
}

/// The release out of `Linux version 6.1.0 (...)`.
fn release(space: &Space<'_>, symbols: &Symbols, image: &[Stretch]) -> Option<String> {
    const BANNER: &str = "Linux version ";
    let parse = |text: &str| Some(text.strip_prefix(BANNER)?.split(' ').next()?.to_owned());
    if let Some(text) = symbols.address("linux_banner").and_then(|at| space.text(at, 512)) {
        return parse(&text);
    }
    for stretch in image.iter().filter(|stretch| !stretch.executable) {
        let mut at = stretch.start;
        while at < stretch.end {
            let page = space.bytes(at, 4096, 4096)?;
            let starts = (0..4096 - BANNER.len()).find(|from| page[*from..].starts_with(BANNER.as_bytes()));
            if let Some(text) = starts.and_then(|from| space.text(at + from as u64, 512)) {
                return parse(&text);
            }
            at += 4096;
        }
    }
    None
}

/// The build-id among the kernel's notes.
fn build_id(space: &Space<'_>, symbols: &Symbols) -> Option<Vec<u8>> {
    let (start, end) = (symbols.address("__start_notes")?, symbols.address("__stop_notes")?);
    let notes = space.bytes(start, end.checked_sub(start)?, 64 << 10)?;
    crate::elf::build_id_of_notes(&notes)
}
