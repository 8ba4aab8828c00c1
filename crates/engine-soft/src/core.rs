//! [`Core`]: the architectural state of one software processor, and the accessors that instruction helpers
//! use.

use std::collections::VecDeque;
use std::sync::Arc;

use wardian_cpu::bits::{cr0, cr4, efer, rflags};
use wardian_cpu::{Activity, CpuModel, CpuidContext, DescriptorTable, EngineError, Exit, Segment};
use wardian_irq::LocalInterrupts;
use wardian_memory::GuestMemory;
use wardian_time::TimeBase;

use crate::bases::Bases;
use crate::ctx::{Ctx, CtxBox, LEAVES, VIEWS, View};
use crate::mode::Mode;
use crate::shared::{Mailbox, Request, Shared};
use crate::sys::straight::Straight;
use crate::tlb::Mmu;
use crate::trap::Trap;
use crate::vcpu::Parts;

/// Segment register numbers in encoding order.
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Registers that translated code does not address.
#[derive(Clone, Debug)]
pub struct System {
    /// ES, CS, SS, DS, FS, GS: set them by [`Core::set_segment`] only. The bases that count are in [`Ctx::seg_base`];
    /// that of GS may be out of date here.
    pub segments: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
    /// DR0-DR3.
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    /// Current privilege level. Kept equal to SS.DPL.
    pub cpl: u8,
    pub activity: Activity,
    /// Interrupts (and debug traps) are held off for the next instruction.
    pub interrupt_shadow: bool,
    pub nmi_blocked: bool,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    /// In saved and restored copies; the register itself is in [`Ctx`].
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub mtrr_def_type: u64,
    /// Fixed-range MTRRs (250h, 258h, 259h, 268h-26Fh) and variable ones (200h-20Fh).
    pub mtrr_fixed: [u64; 11],
    pub mtrr_var: [u64; 16],
    pub debugctl: u64,
    pub mcg_status: u64,
    /// kvmclock and steal-time MSRs as written.
    pub pv_system_time: u64,
    pub pv_wall_clock: u64,
    pub pv_steal_time: u64,
}

/// Who makes a memory access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// As the current privilege level (and EFLAGS.AC) has it.
    Current,
    /// Implicit supervisor access: descriptor tables, TSS, IDT, and stack frames pushed to inner rings. Obeys
    /// SMAP regardless of EFLAGS.AC.
    Supervisor,
}

/// One software processor.
pub struct Core {
    /// Number of the vCPU, also its APIC ID.
    pub index: usize,
    pub ctx: CtxBox,
    pub sys: System,
    pub mmu: Mmu,
    pub mem: GuestMemory,
    pub time: Arc<TimeBase>,
    pub model: Arc<CpuModel>,
    pub cpus: usize,
    pub irq: Arc<dyn LocalInterrupts>,
    /// Stops of the whole process that the guest was told of ([`wardian_time::Pulse::stops`]).
    pub stops: u64,
    /// Answers that the machine has given to the instruction that is being run again, in order.
    pub journal: Vec<u64>,
    /// How many of them the current attempt has used.
    pub journal_used: usize,
    /// The instruction's WRMSR/OUT answer was "fault".
    pub journal_fault: bool,
    /// Exits of completed instructions that the machine has not seen yet.
    pub out: VecDeque<Exit>,
    /// What stopped translated code in a slow access.
    pub trap: Option<Trap>,
    /// Page-crossing or device write that waits for its instruction to finish.
    pub commit: Option<crate::access::Commit>,
    /// Something that the choice of translated code depends on has changed (segments, CRs, CPL ...).
    pub mode_dirty: bool,
    /// Instruction breakpoints may have changed.
    pub stops_dirty: bool,
    /// Mode for which each view's jump cache was filled.
    pub view_mode: [Mode; VIEWS],
    /// Where floating code lies.
    pub bases: Bases,
    /// Instructions of translated code that are run by a call.
    pub straight: Straight,
    /// RAM pages as they were before a run that may be taken back.
    pub undo: Option<Box<crate::vcpu::check::Undo>>,
    /// Linear ranges watched by a debugger or DR0-DR3: (start, length, on read, on write).
    pub watch: Vec<(u64, u64, bool, bool)>,
    /// A watched access happened in the current instruction: DR6 bits (B0-B3), or bit 63 for the debugger's.
    pub watch_hit: u64,
    /// No other vCPU runs guest code until this one has completed its instruction.
    pub alone: bool,
    /// Address of the last watched access.
    pub watch_address: u64,
    pub counters: Counters,
    /// Bits of a physical address that exist.
    pub phys_mask: u64,
    /// What CPUID says of each XSAVE component from 2 on (leaf 0Dh).
    pub components: [[u32; 4]; 16],
    /// 1 GiB pages exist.
    pub gib_pages: bool,
    /// Count of retired instructions at which the budget in the context is used up, where they are counted.
    pub goal: u64,
    /// Count of retired instructions up to which guest time has been moved, where that is what moves it.
    clock: Option<u64>,
    shared: Arc<Shared>,
    mailbox: Arc<Mailbox>,
}

/// Event counts, for `inspect` and the benches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    pub translations: u64,
    pub translated_instructions: u64,
    /// Of the host, spent on them.
    pub translation_ticks: u64,
    pub tlb_misses: u64,
    pub tlb_flushes: u64,
    pub page_invalidations: u64,
    pub space_switches: u64,
    pub lookups: u64,
    /// Why translated code was left, by [`Leave`].
    pub left: [u64; LEAVES],
    /// Indirect jumps whose slot of the jump cache was another's.
    pub jump_conflicts: u64,
    pub interpreted: u64,
    pub exceptions: u64,
    pub interrupts: u64,
    pub nmis: u64,
    pub syscalls: u64,
    pub slow_accesses: u64,
    pub code_invalidations: u64,
    pub cache_flushes: u64,
    pub exits: u64,
    pub entries: u64,
}

impl Core {
    /// General register `index` (0-15), all 64 bits.
    #[inline]
    pub fn gpr(&self, index: usize) -> u64 {
        self.ctx.get().gpr[index & 15]
    }
    /// Sets general register `index`, all 64 bits.
    #[inline]
    pub fn set_gpr(&mut self, index: usize, value: u64) {
        self.ctx.get_mut().gpr[index & 15] = value;
    }

    /// RIP (offset in CS, not linear).
    pub fn rip(&self) -> u64 {
        let ctx = self.ctx.get();
        let offset = ctx.rip.wrapping_sub(ctx.seg_base[seg::CS]);
        if self.is_64bit() { offset } else { offset & 0xffff_ffff }
    }
    /// Sets RIP, an offset in CS. Call it after CS is set.
    pub fn set_rip(&mut self, offset: u64) {
        let code64 = self.is_64bit();
        let ctx = self.ctx.get_mut();
        ctx.rip = if code64 {
            offset
        } else {
            // A 16- or 32-bit code segment: linear addresses are 32 bits.
            (ctx.seg_base[seg::CS].wrapping_add(offset & 0xffff_ffff)) & 0xffff_ffff
        };
    }

    /// RFLAGS, whole.
    pub fn rflags(&self) -> u64 {
        let ctx = self.ctx.get();
        let slot = u64::from(ctx.flags);
        let low = (slot >> 8) & (rflags::CF | rflags::PF | rflags::AF | rflags::ZF | rflags::SF);
        let of = if slot & 1 != 0 { rflags::OF } else { 0 };
        (ctx.rflags & !rflags::ARITH) | low | of | rflags::FIXED
    }
    /// Sets RFLAGS, whole; reserved bits are the caller's business.
    pub fn set_rflags(&mut self, value: u64) {
        let old = self.ctx.get().rflags;
        let ctx = self.ctx.get_mut();
        ctx.rflags = (value & !rflags::ARITH) | rflags::FIXED;
        let low = value & (rflags::CF | rflags::PF | rflags::AF | rflags::ZF | rflags::SF);
        ctx.flags = ((low as u32 | 2) << 8) | u32::from(value & rflags::OF != 0);
        if (old ^ value) & (rflags::TF | rflags::AC | rflags::VM | rflags::RF) != 0 {
            self.mode_dirty = true;
        }
    }

    /// EFER.LMA: IA-32e mode.
    pub fn long_mode(&self) -> bool {
        self.sys.efer & efer::LMA != 0
    }
    /// 64-bit code runs.
    pub fn is_64bit(&self) -> bool {
        self.long_mode() && self.sys.segments[seg::CS].long()
    }
    /// Protected mode (CR0.PE).
    pub fn protected(&self) -> bool {
        self.sys.cr0 & cr0::PE != 0
    }
    /// Virtual-8086 mode.
    pub fn v86(&self) -> bool {
        self.ctx.get().rflags & rflags::VM != 0
    }
    /// Current privilege level.
    pub fn cpl(&self) -> u8 {
        self.sys.cpl
    }

    /// Loads segment register `index` with an already checked value; keeps the base mirror true. For CS the
    /// RIP must be set afterwards. Loading SS also sets the CPL unless in real or V86 mode.
    pub fn set_segment(&mut self, index: usize, segment: Segment) {
        self.sys.segments[index] = segment;
        self.ctx.get_mut().seg_base[index] = segment.base;
        self.mode_dirty = true;
    }
    /// Sets the current privilege level.
    pub fn set_cpl(&mut self, cpl: u8) {
        self.sys.cpl = cpl;
        self.mode_dirty = true;
    }

    /// The view that ordinary data accesses use now.
    pub fn view(&self) -> View {
        if self.sys.cpl == 3 {
            View::User
        } else if self.sys.cr4 & cr4::SMAP != 0 && self.ctx.get().rflags & rflags::AC == 0 {
            View::Kernel
        } else {
            View::KernelUser
        }
    }

    /// Tells the guest if the whole process was stopped since it was last asked: before it sees a clock, or an
    /// interrupt whose handler compares clocks.
    #[inline]
    pub fn notice_stops(&mut self) {
        let stops = self.time.pulse().stops();
        self.notice(stops);
    }

    #[inline]
    fn notice(&mut self, stops: u64) {
        // Where time is counted, none passes while the process is stopped.
        if stops != self.stops && self.clock.is_none() {
            self.stops = stops;
            crate::sys::paravirt::update_clock(self, true);
        }
    }

    /// The guest reads its TSC.
    pub fn read_tsc(&mut self) -> u64 {
        let (tsc, stops) = self.time.tsc_and_stops();
        self.notice(stops);
        tsc.wrapping_add(self.sys.tsc_adjust)
    }

    /// Whether instructions are counted.
    pub(crate) fn is_counted(&self) -> bool {
        self.clock.is_some()
    }

    /// Instructions retired so far, where they are counted.
    pub fn retired(&self) -> u64 {
        self.goal.wrapping_sub(self.c().budget as u64)
    }

    /// Lets `left` more instructions retire.
    pub fn set_budget(&mut self, left: i64) {
        self.goal = self.retired().wrapping_add(left as u64);
        self.ctx.get_mut().budget = left;
    }

    /// Moves guest time to where the vCPU is, if that is what moves it.
    #[inline]
    pub fn sync_time(&mut self) {
        if let Some(clock) = self.clock {
            let retired = self.retired();
            self.time.advance(wardian_time::Nanos(retired.wrapping_sub(clock)));
            self.clock = Some(retired);
        }
    }

    /// Guest TSC of this vCPU now.
    pub fn tsc(&self) -> u64 {
        self.time.tsc().wrapping_add(self.sys.tsc_adjust)
    }

    /// Queues the exit of an instruction that is complete but for what the machine does with it (port and
    /// device writes, HLT).
    pub fn push_exit(&mut self, exit: Exit) {
        self.out.push_back(exit);
    }

    /// Asks the machine: returns its answer if this run of the instruction already has it, otherwise stops the
    /// instruction, which is then run again from its start. `Answer::Fault` comes back as #GP(0).
    pub fn ask(&mut self, exit: Exit) -> crate::trap::Result<u64> {
        if let Some(answer) = self.journal.get(self.journal_used).copied() {
            self.journal_used += 1;
            if self.journal_fault && self.journal_used == self.journal.len() {
                return Err(Trap::gp(0));
            }
            return Ok(answer);
        }
        Err(Trap::Exit(exit))
    }

    /// Jump caches are about to be filled for `mode`. Code for the supervisor goes from one of its views to the other
    /// by itself: both are for the same mode.
    pub(crate) fn note_mode(&mut self, mode: Mode) {
        if self.view_mode[mode.view() as usize] == mode {
            return;
        }
        let user = mode.view() == View::User;
        for view in [View::User, View::Kernel, View::KernelUser] {
            if user == (view == View::User) {
                self.view_mode[view as usize] = mode.with_view(view);
            }
        }
        self.mmu.drop_jumps(&mut self.ctx);
    }

    /// The mode of the code that runs, unless `mode_dirty`.
    #[inline]
    pub fn mode(&self) -> Mode {
        self.ctx.get().mode
    }

    /// The context.
    #[inline]
    pub fn c(&self) -> &Ctx {
        self.ctx.get()
    }
}

impl System {
    fn blank() -> System {
        let none = Segment::default();
        System {
            segments: [none; 6],
            ldtr: none,
            tr: none,
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            cr0: cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            cpl: 0,
            activity: Activity::Running,
            interrupt_shadow: false,
            nmi_blocked: false,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_adjust: 0,
            pat: 0x0007_0406_0007_0406,
            misc_enable: 1,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_var: [0; 16],
            debugctl: 0,
            mcg_status: 0,
            pv_system_time: 0,
            pv_wall_clock: 0,
            pv_steal_time: 0,
        }
    }
}

impl Core {
    /// A processor in no particular state; `jump_miss` is where empty jump-cache slots lead.
    pub(crate) fn build(
        parts: Parts,
        jump_miss: u64,
        shared: Arc<Shared>,
        mailbox: Arc<Mailbox>,
    ) -> Result<Box<Core>, EngineError> {
        let mut ctx = CtxBox::new()?;
        let mmu = Mmu::new(&mut ctx, &parts.mem, jump_miss);
        let bases = Bases::new(&mut ctx, (parts.mem.size() / 4096) as usize);
        let fresh = ctx.get_mut();
        fresh.flags = 2 << 8;
        fresh.rflags = rflags::FIXED;
        fresh.xsave[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        fresh.xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        Ok(Box::new(Core {
            index: parts.index,
            ctx,
            sys: System::blank(),
            mmu,
            phys_mask: (1u64 << parts.model.physical_bits()) - 1,
            components: std::array::from_fn(|n| {
                parts.model.cpuid(0xd, n as u32, &CpuidContext { osxsave: true, ..CpuidContext::default() })
            }),
            gib_pages: parts.model.has(wardian_cpu::Feature::Pdpe1gb),
            goal: 0,
            clock: parts.time.is_counted().then_some(0),
            mem: parts.mem,
            time: parts.time,
            model: parts.model,
            cpus: parts.cpus,
            irq: parts.irq,
            stops: 0,
            journal: Vec::new(),
            journal_used: 0,
            journal_fault: false,
            out: VecDeque::new(),
            trap: None,
            commit: None,
            mode_dirty: true,
            stops_dirty: true,
            view_mode: [Mode::default(); VIEWS],
            bases,
            straight: Straight::default(),
            undo: None,
            watch: Vec::new(),
            watch_hit: 0,
            alone: false,
            watch_address: 0,
            counters: Counters::default(),
            shared,
            mailbox,
        }))
    }

    /// A processor over `mem` for unit tests: protected mode off, everything zero.
    #[cfg(test)]
    pub(crate) fn for_test(mem: GuestMemory) -> Box<Core> {
        let time = TimeBase::manual(wardian_time::Nanos(0));
        let offer = wardian_cpu::Offer { tsc_hz: 1_000_000_000, ..Default::default() };
        let model = Arc::new(CpuModel::host("host", &offer).unwrap());
        let parts = Parts { index: 0, cpus: 1, mem, time, model, irq: Arc::new(wardian_irq::Quiet) };
        let shared = Arc::new(Shared::default());
        let mailbox = shared.join();
        Core::build(parts, 0, shared, mailbox).unwrap()
    }

    /// No other vCPU runs guest code from now on.
    pub fn begin_alone(&mut self) {
        if !self.alone {
            self.shared.begin_alone(&self.mailbox);
            self.alone = true;
        }
    }

    /// The others go on, if they were stopped.
    pub fn end_alone(&mut self) {
        if std::mem::take(&mut self.alone) {
            self.shared.end_alone();
        }
    }

    /// Marks bytes of a RAM page as translated: nobody may write them unnoticed from now on.
    pub fn mark_translated(&mut self, page: usize, host: usize, range: std::ops::Range<usize>) {
        if self.mem.mark_code(page, range) == 0 {
            self.mmu.forbid_writes(&mut self.ctx, page, host);
            self.shared.post(Request::BecameCode { page }, Some(&self.mailbox));
        }
    }

    /// Host address of RAM page number `page`.
    pub fn ram_page_host(&self, page: usize) -> Option<usize> {
        let low = wardian_memory::LOW_RAM_END / 4096;
        let page = page as u64;
        let gpa = if page < low { page * 4096 } else { wardian_memory::HIGH_RAM_START + (page - low) * 4096 };
        self.mem.page(wardian_memory::Gpa(gpa)).map(|(_, host)| host)
    }

    /// Sets the debugger's watchpoints behind those of DR0-DR3 (which are the first four entries if any is in use).
    pub fn set_debug_watch(&mut self, watchpoints: &[(u64, u64, bool, bool)]) {
        self.watch.truncate(4);
        if !watchpoints.is_empty() {
            self.watch.resize(4, (0, 0, false, false));
            self.watch.extend_from_slice(watchpoints);
        }
        self.flush_tlb(crate::tlb::Flush::All);
    }
}
