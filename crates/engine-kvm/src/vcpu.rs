//! [`KvmVcpu`]: the run loop. Look what waits, enter the guest, say why it left, complete it with the answer.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_HYPERCALL, KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SET_TPR,
    KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR,
};
use kvm_ioctls::VcpuFd;
use wardian_cpu::bits::{efer, msr};
use wardian_cpu::{
    Activity, Answer, CpuModel, CpuState, DebugRequest, EngineError, Exit, Glance, OnTaken, Taken, Vcpu,
};
use wardian_irq::{Kick, LocalInterrupts};

use crate::debug::Debug;
use crate::msrs::{self, Clocks};
use crate::sys::{self, Kicker, RunPage};
use crate::{KvmError, Shared, state};

/// What KVM has begun and the next answer completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begun {
    Nothing,
    /// `count` elements of `size` bytes at `offset` of the run page; the answer is for element `at`.
    PortIn {
        port: u16,
        size: u8,
        count: u32,
        offset: u64,
        at: u32,
    },
    PortOut {
        port: u16,
        size: u8,
        count: u32,
        offset: u64,
        at: u32,
    },
    MmioRead,
    MmioWrite,
    MsrRead,
    MsrWrite {
        index: u32,
        value: u64,
    },
    /// The machine is told of a new `IA32_TSC_ADJUST`; the instruction is not complete yet.
    Told,
    Hypercall,
}

#[derive(Debug, Default)]
struct Counters {
    entries: u64,
    interrupts: u64,
    nmis: u64,
    windows: u64,
    own_msrs: u64,
}

/// A vCPU of KVM.
pub(crate) struct KvmVcpu {
    index: usize,
    // Before `shared`: the vCPU goes before the memory that it uses.
    fd: VcpuFd,
    page: Arc<RunPage>,
    shared: Arc<Shared>,
    kicker: Arc<Kicker>,
    irq: Arc<dyn LocalInterrupts>,
    model: Arc<CpuModel>,
    begun: Begun,
    /// KVM takes an interrupt now.
    ready: bool,
    activity: Activity,
    tsc_adjust: u64,
    clocks: Clocks,
    debug: Debug,
    on_taken: Option<OnTaken>,
    counters: Counters,
    /// The thread that runs it.
    thread: i32,
}

impl KvmVcpu {
    pub(crate) fn new(
        shared: Arc<Shared>,
        index: usize,
        fd: VcpuFd,
        model: Arc<CpuModel>,
        irq: Arc<dyn LocalInterrupts>,
    ) -> Result<KvmVcpu, EngineError> {
        let page = RunPage::map(&fd, shared.run_size)
            .map_err(|source| KvmError::Call { what: "the run page of a vCPU", source })?;
        let page = Arc::new(page);
        let kicker = Arc::new(Kicker::new(Arc::clone(&page)));
        Ok(KvmVcpu {
            index,
            fd,
            page,
            shared,
            kicker,
            irq,
            model,
            begun: Begun::Nothing,
            ready: false,
            activity: Activity::Running,
            tsc_adjust: 0,
            clocks: Clocks::default(),
            debug: Debug::default(),
            on_taken: None,
            counters: Counters::default(),
            thread: 0,
        })
    }

    fn linear_rip(&self) -> u64 {
        let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), self.fd.get_sregs()) else { return 0 };
        let long = sregs.efer & efer::LMA != 0 && sregs.cs.l != 0;
        if long { regs.rip } else { sregs.cs.base.wrapping_add(regs.rip) & 0xffff_ffff }
    }

    fn cannot(&self, what: String) -> EngineError {
        EngineError::Unsupported { vcpu: self.index, rip: self.linear_rip(), what }
    }

    fn failed(&self, what: &str, error: &io::Error) -> EngineError {
        self.cannot(format!("KVM refused {what}: {error}"))
    }

    /// The TSC of this vCPU is that of the time base, plus its adjustment.
    fn set_tsc(&self) -> io::Result<()> {
        let base = self.shared.time.tsc_offset().unwrap_or(0);
        sys::set_tsc_offset(&self.fd, base.wrapping_add(self.tsc_adjust))
    }

    fn write_clock(&self, stopped: bool) {
        let Shared { memory, time, .. } = &*self.shared;
        wardian_cpu::paravirt::write_clock(memory, time, self.clocks.system_time, self.tsc_adjust, stopped);
    }

    // ---- Answers ----

    /// Puts `answer` where KVM looks for it; `Some` if the same operation asks again.
    fn complete(&mut self, answer: Answer) -> Result<Option<Exit>, EngineError> {
        let data = if let Answer::Data(data) = answer { data } else { u64::MAX };
        match self.begun {
            Begun::Nothing | Begun::MmioWrite | Begun::Told => {}
            Begun::PortIn { size, offset, at, count, .. } => {
                self.page.set_data(offset + u64::from(at) * u64::from(size), size.into(), data);
                if at + 1 < count {
                    return Ok(Some(self.next_element()));
                }
            }
            Begun::PortOut { at, count, .. } if at + 1 < count => return Ok(Some(self.next_element())),
            Begun::PortOut { .. } => {}
            Begun::MmioRead => {
                let mut reason = self.page.reason();
                reason.mmio.data = data.to_le_bytes();
                self.page.set_reason(reason);
            }
            Begun::MsrRead => self.answer_msr((answer != Answer::Fault).then_some(data)),
            Begun::MsrWrite { index, value } => {
                if answer != Answer::Fault && index == msr::APIC_BASE {
                    // KVM shows the APIC bit of CPUID by it.
                    msrs::set(&self.fd, index, value);
                }
                self.answer_msr((answer != Answer::Fault).then_some(0));
            }
            Begun::Hypercall => {
                let mut reason = self.page.reason();
                reason.hypercall.ret = data;
                self.page.set_reason(reason);
            }
        }
        Ok(None)
    }

    /// `None`: #GP.
    fn answer_msr(&mut self, value: Option<u64>) {
        let mut reason = self.page.reason();
        reason.msr.error = u8::from(value.is_none());
        reason.msr.data = value.unwrap_or(0);
        self.page.set_reason(reason);
    }

    /// A string instruction goes on to its next element.
    fn next_element(&mut self) -> Exit {
        if let Begun::PortIn { at, .. } | Begun::PortOut { at, .. } = &mut self.begun {
            *at += 1;
        }
        self.port_exit()
    }

    fn port_exit(&self) -> Exit {
        match self.begun {
            Begun::PortOut { port, size, offset, at, .. } => {
                let data = self.page.data(offset + u64::from(at) * u64::from(size), size.into()) as u32;
                Exit::PortOut { port, size, data }
            }
            Begun::PortIn { port, size, .. } => Exit::PortIn { port, size },
            _ => Exit::Interrupted,
        }
    }

    // ---- What waits ----

    /// Completes what KVM has begun without going on.
    fn finish(&mut self) -> Result<(), EngineError> {
        if self.begun == Begun::Nothing {
            return Ok(());
        }
        self.kicker.set();
        let result = sys::run(&self.fd);
        self.begun = Begun::Nothing;
        match result {
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => Ok(()),
            Err(e) => Err(self.failed("to complete an access", &e)),
            Ok(()) => Err(self.cannot("an INIT within an access that goes on".into())),
        }
    }

    fn init(&mut self) -> Result<(), EngineError> {
        self.finish()?;
        let mut state = self.state().after_init(self.model.signature());
        state.activity = if self.index == 0 { Activity::Running } else { Activity::WaitForSipi };
        self.set_state(&state)
    }

    fn start_up(&mut self, vector: u8) -> Result<(), EngineError> {
        let mut state = self.state();
        state.segments[CpuState::CS].selector = u16::from(vector) << 8;
        state.segments[CpuState::CS].base = u64::from(vector) << 12;
        state.rip = 0;
        state.activity = Activity::Running;
        self.set_state(&state)
    }

    fn tell_taken(&mut self, vector: u8) {
        if self.on_taken.is_some() {
            let rip = self.linear_rip();
            if let Some(told) = &mut self.on_taken {
                told(Taken { retired: 0, rip, vector });
            }
        }
    }

    /// Gives KVM what the local APIC has for this vCPU; says whether more waits for a better moment.
    fn events(&mut self) -> Result<bool, EngineError> {
        let pending = self.irq.pending();
        if !pending.any() {
            return Ok(false);
        }
        if pending.init && self.irq.take_init() {
            self.init()?;
        }
        if self.activity == Activity::WaitForSipi {
            if let Some(vector) = self.irq.take_startup() {
                self.start_up(vector)?;
            }
            return Ok(false);
        }
        if pending.nmi && self.irq.take_nmi() {
            self.fd.nmi().map_err(KvmError::call("an NMI"))?;
            self.counters.nmis += 1;
            self.activity = Activity::Running;
            self.tell_taken(2);
        }
        if !pending.interrupt {
            return Ok(false);
        }
        if !self.ready {
            return Ok(true);
        }
        let Some(vector) = self.irq.acknowledge() else { return Ok(false) };
        sys::interrupt(&self.fd, vector).map_err(|e| self.failed("an interrupt", &e))?;
        self.ready = false;
        self.counters.interrupts += 1;
        self.activity = Activity::Running;
        self.tell_taken(vector);
        Ok(self.irq.pending().interrupt)
    }

    // ---- Running ----

    fn enter(&mut self, window: bool) -> io::Result<()> {
        let cr8 = self.irq.cr8();
        self.page.want_window(window);
        self.page.set_cr8(cr8);
        self.kicker.enter(self.thread);
        let result = sys::run(&self.fd);
        self.kicker.leave();
        self.counters.entries += 1;
        self.ready = self.page.ready();
        let now = self.page.cr8();
        if now != cr8 {
            self.irq.set_cr8(now);
        }
        result
    }

    /// One answer, one exit.
    fn go(&mut self, answer: Answer) -> Result<Exit, EngineError> {
        if let Some(exit) = self.complete(answer)? {
            return Ok(exit);
        }
        loop {
            // What KVM has begun is completed first, and a kick is then seen by KVM itself.
            let kicked = self.begun == Begun::Nothing && self.kicker.take();
            if kicked {
                return Ok(Exit::Interrupted);
            }
            // What is acknowledged here enters the guest now, unless a kick comes in between.
            self.kicker.look(self.thread);
            let window = self.events();
            self.kicker.look(0);
            let window = window?;
            match self.activity {
                Activity::Running => {}
                Activity::Halted | Activity::WaitForSipi => return Ok(Exit::Halt),
                Activity::Shutdown => return Ok(Exit::Shutdown),
            }
            self.debug.before(&self.fd);
            let result = self.enter(window);
            self.begun = Begun::Nothing;
            if let Err(e) = result {
                match e.raw_os_error() {
                    Some(libc::EINTR) => {
                        self.kicker.take();
                        return Ok(Exit::Interrupted);
                    }
                    Some(libc::EAGAIN) => continue,
                    _ => return Err(self.failed("to run", &e)),
                }
            }
            if let Some(exit) = self.left()? {
                return Ok(exit);
            }
        }
    }

    /// Why KVM left the guest; `None` to go on.
    fn left(&mut self) -> Result<Option<Exit>, EngineError> {
        let reason = self.page.reason();
        Ok(Some(match self.page.exit_reason() {
            KVM_EXIT_IO => {
                #[allow(unsafe_code)]
                // SAFETY: the member of the union that the exit reason names.
                let io = unsafe { reason.io };
                let (port, size, count, offset) = (io.port, io.size, io.count.max(1), io.data_offset);
                self.begun = if u32::from(io.direction) == KVM_EXIT_IO_OUT {
                    Begun::PortOut { port, size, count, offset, at: 0 }
                } else {
                    Begun::PortIn { port, size, count, offset, at: 0 }
                };
                self.port_exit()
            }
            KVM_EXIT_MMIO => {
                #[allow(unsafe_code)]
                // SAFETY: as above.
                let mmio = unsafe { reason.mmio };
                let (gpa, size) = (mmio.phys_addr, mmio.len.clamp(1, 8) as u8);
                if mmio.is_write == 0 {
                    self.begun = Begun::MmioRead;
                    return Ok(Some(Exit::MmioRead { gpa, size }));
                }
                self.begun = Begun::MmioWrite;
                let mask = u64::MAX >> (64 - 8 * u32::from(size));
                Exit::MmioWrite { gpa, size, data: u64::from_le_bytes(mmio.data) & mask }
            }
            KVM_EXIT_X86_RDMSR => {
                #[allow(unsafe_code)]
                // SAFETY: as above.
                let index = unsafe { reason.msr }.index;
                return Ok(self.read_msr(index));
            }
            KVM_EXIT_X86_WRMSR => {
                #[allow(unsafe_code)]
                // SAFETY: as above.
                let asked = unsafe { reason.msr };
                return self.write_msr(asked.index, asked.data);
            }
            KVM_EXIT_HLT => {
                self.activity = Activity::Halted;
                return Ok(None);
            }
            KVM_EXIT_SHUTDOWN => {
                self.activity = Activity::Shutdown;
                Exit::Shutdown
            }
            KVM_EXIT_HYPERCALL => {
                #[allow(unsafe_code)]
                // SAFETY: as above.
                let call = unsafe { reason.hypercall };
                self.begun = Begun::Hypercall;
                let [a, b, c, d, ..] = call.args;
                Exit::Hypercall { number: call.nr, args: [a, b, c, d] }
            }
            KVM_EXIT_DEBUG => {
                #[allow(unsafe_code)]
                // SAFETY: as above.
                let arch = unsafe { reason.debug }.arch;
                return Ok(self.debug.met(&self.fd, &arch).map(Exit::Debug));
            }
            KVM_EXIT_IRQ_WINDOW_OPEN => {
                self.counters.windows += 1;
                return Ok(None);
            }
            KVM_EXIT_SET_TPR | KVM_EXIT_INTR => return Ok(None),
            KVM_EXIT_FAIL_ENTRY => {
                #[allow(unsafe_code)]
                // SAFETY: as above.
                let why = unsafe { reason.fail_entry }.hardware_entry_failure_reason;
                return Err(self.cannot(format!("the processor refuses this state (reason {why:#x})")));
            }
            KVM_EXIT_INTERNAL_ERROR => return Err(self.internal_error()),
            other => {
                return Err(self.cannot(format!("KVM left the guest for reason {other}, which nobody knows")));
            }
        }))
    }

    /// KVM gave up, mostly on an instruction that it does not emulate.
    fn internal_error(&self) -> EngineError {
        #[allow(unsafe_code)]
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR: this member of the union is the one in use.
        let kind = unsafe { self.page.reason().internal }.suberror;
        let what = match kind {
            1 => {
                let mut code = [0u8; 15];
                let found =
                    self.fd.translate_gva(self.linear_rip()).ok().filter(|at| at.valid != 0).is_some_and(
                        |at| {
                            let gpa = wardian_memory::Gpa(at.physical_address);
                            self.shared.memory.read(gpa, &mut code).is_ok()
                        },
                    );
                let bytes: Vec<String> = code.iter().map(|byte| format!("{byte:02x}")).collect();
                let bytes = if found { bytes.join(" ") } else { "that cannot be read".into() };
                format!("KVM does not emulate the instruction here: bytes {bytes}")
            }
            2 => "KVM met an exception while it delivered another".into(),
            kind => format!("KVM gave up (internal error {kind})"),
        };
        self.cannot(what)
    }

    fn read_msr(&mut self, index: u32) -> Option<Exit> {
        self.begun = Begun::MsrRead;
        let own = match index {
            msr::TSC_ADJUST => Some(self.tsc_adjust),
            index => msrs::clock(&mut self.clocks, index).map(|register| *register),
        };
        match own {
            Some(value) => {
                self.counters.own_msrs += 1;
                self.answer_msr(Some(value));
                None
            }
            None => Some(Exit::MsrRead { index }),
        }
    }

    fn write_msr(&mut self, index: u32, value: u64) -> Result<Option<Exit>, EngineError> {
        let adjust = match index {
            msr::TSC_ADJUST => Some(value),
            msr::TSC => Some(value.wrapping_sub(self.shared.time.tsc())),
            _ => None,
        };
        if let Some(adjust) = adjust {
            self.tsc_adjust = adjust;
            self.set_tsc().map_err(|e| self.failed("a time-stamp counter", &e))?;
            self.write_clock(false);
            self.answer_msr(Some(0));
            self.begun = Begun::Told;
            return Ok(Some(Exit::MsrWrite { index: msr::TSC_ADJUST, value: adjust }));
        }
        if let Some(good) = msrs::write_clock(&self.shared, &mut self.clocks, self.tsc_adjust, index, value) {
            self.counters.own_msrs += 1;
            self.begun = Begun::Told;
            self.answer_msr(good.then_some(0));
            return Ok(None);
        }
        self.begun = Begun::MsrWrite { index, value };
        Ok(Some(Exit::MsrWrite { index, value }))
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, answer: Answer) -> Result<Exit, EngineError> {
        self.thread = sys::this_thread();
        self.go(answer)
    }

    fn state(&mut self) -> CpuState {
        let own = state::Own {
            msrs: msrs::save(&self.fd, self.clocks),
            tsc_adjust: self.tsc_adjust,
            activity: self.activity,
            cr8: self.irq.cr8(),
        };
        // The calls cannot fail on a vCPU that lives.
        state::save(&self.fd, own).unwrap_or_else(|error| {
            tracing::error!(vcpu = self.index, %error, "The state of a vCPU cannot be read");
            CpuState::reset()
        })
    }

    fn glance(&mut self) -> Glance {
        let user = self.fd.get_sregs().is_ok_and(|sregs| sregs.ss.dpl == 3 && sregs.cr0 & 1 != 0);
        Glance {
            rip: self.linear_rip(),
            user,
            interrupts_enabled: self.page.interrupts_enabled(),
            interrupts: self.counters.interrupts,
        }
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        state::restore(&self.fd, state, self.irq.apic_base())?;
        self.clocks = msrs::restore(&self.fd, &state.msrs)?;
        self.tsc_adjust = state.tsc_adjust;
        self.activity = state.activity;
        self.begun = Begun::Nothing;
        // Not known before KVM has looked.
        self.ready = false;
        self.set_tsc().map_err(|e| self.failed("a time-stamp counter", &e))
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kicker) as _
    }

    fn set_debug(&mut self, request: &DebugRequest) {
        self.debug.set(&self.fd, request);
    }

    fn translate(&mut self, linear: u64) -> Option<u64> {
        let found = self.fd.translate_gva(linear).ok()?;
        (found.valid != 0).then_some(found.physical_address)
    }

    fn resumed(&mut self) {
        if let Err(error) = self.set_tsc() {
            tracing::error!(vcpu = self.index, %error, "The time-stamp counter of a vCPU cannot be set");
        }
        self.write_clock(true);
    }

    fn on_taken(&mut self, told: Option<OnTaken>) {
        self.on_taken = told;
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let Counters { entries, interrupts, nmis, windows, own_msrs } = self.counters;
        vec![
            ("entries", entries),
            ("interrupts", interrupts),
            ("nmis", nmis),
            ("interrupt windows", windows),
            ("own registers", own_msrs),
        ]
    }
}
