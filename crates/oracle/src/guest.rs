//! [`Guest`]: runs cases in a guest of the engine under test.
//!
//! The guest has one address space (its data window and code slots where the native runner has them), Linux's user
//! selectors, and an IDT whose handlers halt, each at its own address: what ended a case is where the guest halted,
//! and the rest is in the frame on its kernel stack.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use wardian_cpu::bits::{cr0, cr4, efer, vector};
use wardian_cpu::{
    Activity, Answer, CpuModel, CpuState, DescriptorTable, Engine, EngineError, Exit, Segment, Vcpu,
};
use wardian_irq::{Kick, Quiet};
use wardian_memory::{Gpa, GuestMemory, MemoryError};

use crate::case::{
    CODE, CODE_BYTES, Case, DATA, DATA_PAGES, Fault, Outcome, READ_ONLY, State, WINDOW, XSAVE, plain_null,
};

/// Bytes of RAM that the guest needs.
pub const RAM: u64 = 16 << 20;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const KERNEL_PT: u64 = 0x4000;
const DATA_PT: u64 = 0x5000;
const CODE_PT: u64 = 0x6000;
const GDT: u64 = 0x10000;
const IDT: u64 = 0x11000;
const TSS: u64 = 0x12000;
const HANDLERS: u64 = 0x13000;
const STACK_TOP: u64 = 0x16000;
const DATA_PHYSICAL: u64 = 0x10_0000;
const CODE_PHYSICAL: u64 = 0x20_0000;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const ACCESSED_DIRTY: u64 = 0x60;

/// The GDT of Linux as far as user code can see it.
const DESCRIPTORS: [u64; 16] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00af_9b00_0000_ffff, // 10h: kernel code
    0x00cf_9300_0000_ffff, // 18h: kernel data
    0x00cf_fb00_0000_ffff, // 23h: user code, 32-bit
    0x00cf_f300_0000_ffff, // 2Bh: user data
    0x00af_fb00_0000_ffff, // 33h: user code
    0,
    0, // 40h: the TSS, filled in below
    0,
    0,
    0,
    0x01cf_f300_0000_ffff, // 63h: TLS_SELECTOR
    0,
    0,
    0,
];

/// What the engine did with a case.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The engine gave up.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// RAM could not be reached.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It left guest code for a reason that no case has.
    #[error("The case ended in {0}")]
    Exit(String),
    /// It did not end within two seconds.
    #[error("The case did not end")]
    Hang,
    /// It halted where no handler is.
    #[error("The guest halted at {0:#x}")]
    Lost(u64),
}

/// The guest.
pub struct Guest {
    vcpu: Box<dyn Vcpu>,
    memory: GuestMemory,
    base: CpuState,
    xcr0: u64,
    /// Number of the running case; odd while one runs.
    progress: Arc<AtomicU64>,
}

fn segment(selector: u16, rights: u32) -> Segment {
    Segment { selector, base: 0, limit: 0xffff_ffff, rights }
}

fn null(base: u64) -> Segment {
    Segment { selector: 0, base, limit: 0, rights: Segment::UNUSABLE }
}

/// Kicks a vCPU whose case has not moved on for two seconds.
fn watch(progress: &Weak<AtomicU64>, kick: &Arc<dyn Kick>) {
    let mut seen = 0;
    while let Some(progress) = progress.upgrade() {
        let now = progress.load(Ordering::Acquire);
        if now == seen && now % 2 == 1 {
            kick.kick();
        }
        seen = now;
        drop(progress);
        std::thread::sleep(Duration::from_secs(2));
    }
}

impl Guest {
    /// A guest of `engine` in `memory` (all of [`RAM`]) with the vCPU model `model`.
    ///
    /// # Errors
    /// When the engine cannot make or set up the vCPU.
    pub fn new(engine: &dyn Engine, memory: GuestMemory, model: &Arc<CpuModel>) -> Result<Guest, GuestError> {
        build(&memory)?;
        let mut vcpu = engine.create_vcpu(0, model, Arc::new(Quiet))?;
        let mut base = vcpu.state();
        let data = segment(0x2b, 0xc0f3);
        base.segments = [null(0), segment(0x33, 0xa0fb), data, null(0), null(0), null(0)];
        base.gdtr = DescriptorTable { base: GDT, limit: 0x7f };
        base.idtr = DescriptorTable { base: IDT, limit: 0xfff };
        base.tr = Segment { selector: 0x40, base: TSS, limit: 0x67, rights: 0x8b };
        base.ldtr = Segment { selector: 0, base: 0, limit: 0, rights: Segment::UNUSABLE | 0x82 };
        base.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        base.cr3 = PML4;
        let wanted = cr4::PAE
            | cr4::PGE
            | cr4::OSFXSR
            | cr4::OSXMMEXCPT
            | cr4::OSXSAVE
            | cr4::FSGSBASE
            | cr4::SMEP
            | cr4::SMAP;
        base.cr4 = wanted & model.cr4_mask();
        base.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        base.xcr0 = model.xcr0_mask();
        base.activity = Activity::Running;
        let progress = Arc::new(AtomicU64::new(0));
        let (weak, kick) = (Arc::downgrade(&progress), vcpu.kicker());
        std::thread::spawn(move || watch(&weak, &kick));
        Ok(Guest { vcpu, memory, base, xcr0: model.xcr0_mask(), progress })
    }

    /// Puts `bytes` on the read-only page.
    ///
    /// # Errors
    /// When RAM is too small.
    pub fn set_read_only(&mut self, bytes: &[u8]) -> Result<(), GuestError> {
        Ok(self.memory.write(Gpa(DATA_PHYSICAL + READ_ONLY - DATA), &bytes[..4096.min(bytes.len())])?)
    }

    /// Fills the code area, from which cases of one batch run.
    ///
    /// # Errors
    /// When RAM is too small.
    pub fn set_code(&mut self, bytes: &[u8]) -> Result<(), GuestError> {
        Ok(self.memory.write(Gpa(CODE_PHYSICAL), &bytes[..CODE_BYTES.min(bytes.len())])?)
    }

    /// Runs `case`, whose bytes must be in the code area, over a data window that starts as `window`.
    ///
    /// # Errors
    /// When the engine fails or the case does not end as cases do.
    pub fn run(&mut self, case: &Case, window: &[u8]) -> Result<Outcome, GuestError> {
        self.memory.write(Gpa(DATA_PHYSICAL), &window[..WINDOW])?;
        for (address, bytes) in &case.patches {
            self.memory.write(Gpa(DATA_PHYSICAL + address - DATA), bytes)?;
        }
        let before = &mut self.base;
        before.gpr = case.state.gpr;
        before.rip = case.address;
        before.rflags = case.state.rflags;
        before.segments[CpuState::CS] = match case.bitness {
            64 => segment(0x33, 0xa0fb),
            _ => segment(0x23, 0xc0fb),
        };
        for (n, at) in [0usize, 3, 4, 5].into_iter().enumerate() {
            let selector = case.state.selectors[n];
            let base = [0, 0, case.state.fs, case.state.gs][n];
            before.segments[at] = match selector {
                0 => null(base),
                _ => Segment { base, ..segment(selector, 0xc0f3) },
            };
        }
        before.xsave.resize(before.xsave.len().max(XSAVE), 0);
        before.xsave[..XSAVE].copy_from_slice(&case.state.xsave[..]);
        self.vcpu.set_state(before)?;
        self.progress.fetch_add(1, Ordering::AcqRel);
        let exit = self.vcpu.run(Answer::None);
        self.progress.fetch_add(1, Ordering::AcqRel);
        match exit? {
            Exit::Halt => self.collect(),
            Exit::Interrupted => Err(GuestError::Hang),
            other => Err(GuestError::Exit(format!("{other:?}"))),
        }
    }

    fn collect(&mut self) -> Result<Outcome, GuestError> {
        let after = self.vcpu.state();
        let number = after.rip.wrapping_sub(HANDLERS) / 16;
        if number >= 32 {
            return Err(GuestError::Lost(after.rip));
        }
        let number = number as u8;
        let has_error = matches!(number, vector::DF | vector::TS..=vector::PF | vector::AC);
        let mut frame = [0u8; 48];
        self.memory.read(Gpa(STACK_TOP - 48), &mut frame)?;
        let word = |n: usize| u64::from_le_bytes(std::array::from_fn(|i| frame[n * 8 + i]));
        let mut state = State::new();
        state.gpr = after.gpr;
        state.gpr[CpuState::RSP] = word(4);
        state.rflags = word(3);
        state.selectors = [0usize, 3, 4, 5].map(|n| plain_null(after.segments[n].selector));
        (state.fs, state.gs) = (after.segments[4].base, after.segments[5].base);
        let len = XSAVE.min(after.xsave.len());
        state.xsave[..len].copy_from_slice(&after.xsave[..len]);
        if self.xcr0 & 0xe0 == 0 {
            state.xsave[832..].fill(0);
        }
        let mut window = vec![0; WINDOW];
        self.memory.read(Gpa(DATA_PHYSICAL), &mut window)?;
        let fault = Fault {
            vector: number,
            error: if has_error { word(0) } else { 0 },
            address: if number == vector::PF { after.cr2 } else { 0 },
        };
        Ok(Outcome { fault, rip: word(1), state, window })
    }

    /// The engine's own counters.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.vcpu.counters()
    }
}

/// Page tables, descriptor tables and handlers.
fn build(memory: &GuestMemory) -> Result<(), GuestError> {
    let put = |address: u64, value: u64| memory.write(Gpa(address), &value.to_le_bytes());
    let table = PRESENT | WRITE | USER | ACCESSED_DIRTY;
    put(PML4, PDPT | table)?;
    put(PDPT, PD | table)?;
    put(PD, KERNEL_PT | table)?;
    put(PD + (DATA >> 21) * 8, DATA_PT | table)?;
    put(PD + (CODE >> 21) * 8, CODE_PT | table)?;
    for page in 0x10..0x20 {
        put(KERNEL_PT + page * 8, page << 12 | PRESENT | WRITE | ACCESSED_DIRTY)?;
    }
    for page in 0..DATA_PAGES {
        put(DATA_PT + page * 8, (DATA_PHYSICAL + (page << 12)) | table)?;
    }
    let page = (READ_ONLY - DATA) >> 12;
    put(DATA_PT + page * 8, (DATA_PHYSICAL + (page << 12)) | PRESENT | USER | ACCESSED_DIRTY)?;
    for page in 0..CODE_BYTES as u64 / 4096 {
        put(CODE_PT + page * 8, (CODE_PHYSICAL + (page << 12)) | PRESENT | USER | ACCESSED_DIRTY)?;
    }
    for (n, descriptor) in DESCRIPTORS.iter().enumerate() {
        put(GDT + n as u64 * 8, *descriptor)?;
    }
    put(GDT + 0x40, 0x0000_8b00_0000_0067 | (TSS & 0xffff) << 16 | (TSS >> 16 & 0xff) << 32)?;
    put(TSS + 4, STACK_TOP)?;
    put(TSS + 0x64, 0x68 << 16)?; // I/O map beyond the limit: no port is allowed
    for number in 0..32 {
        let handler = HANDLERS + number * 16;
        let privilege = if number == 3 || number == 4 { 0xee00 } else { 0x8e00 };
        put(IDT + number * 16, handler & 0xffff | 0x10 << 16 | privilege << 32 | (handler >> 16) << 48)?;
        put(handler, 0xf4f4_f4f4_f4f4_f4f4)?;
    }
    Ok(())
}
