//! Interrupts held off while a debugger steps, so that a step ends behind the instruction and not in a
//! handler.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use wardian_cpu::{Answer, CpuState, DebugRequest, EngineError, Exit, Glance, OnTaken, Vcpu};
use wardian_irq::{Kick, LocalInterrupts, PendingEvents};

/// What the engine sees of a vCPU's interrupts: all, or, during single steps, INIT and SIPI alone.
pub(crate) struct StepMask {
    inner: Arc<dyn LocalInterrupts>,
    stepping: AtomicBool,
}

impl StepMask {
    pub(crate) fn new(inner: Arc<dyn LocalInterrupts>) -> Arc<StepMask> {
        Arc::new(StepMask { inner, stepping: AtomicBool::new(false) })
    }

    pub(crate) fn set(&self, stepping: bool) {
        self.stepping.store(stepping, Ordering::Relaxed);
    }

    fn stepping(&self) -> bool {
        self.stepping.load(Ordering::Relaxed)
    }
}

impl LocalInterrupts for StepMask {
    fn pending(&self) -> PendingEvents {
        let pending = self.inner.pending();
        if self.stepping() { PendingEvents { interrupt: false, nmi: false, ..pending } } else { pending }
    }

    fn acknowledge(&self) -> Option<u8> {
        if self.stepping() { None } else { self.inner.acknowledge() }
    }

    fn take_nmi(&self) -> bool {
        !self.stepping() && self.inner.take_nmi()
    }

    fn take_init(&self) -> bool {
        self.inner.take_init()
    }

    fn take_startup(&self) -> Option<u8> {
        self.inner.take_startup()
    }

    fn cr8(&self) -> u8 {
        self.inner.cr8()
    }

    fn set_cr8(&self, priority: u8) {
        self.inner.set_cr8(priority);
    }

    fn apic_base(&self) -> u64 {
        self.inner.apic_base()
    }

    fn attach(&self, kick: Arc<dyn Kick>) {
        self.inner.attach(kick);
    }
}

/// A vCPU whose debugger's requests reach its [`StepMask`] as well.
pub(crate) struct Stepped {
    pub(crate) vcpu: Box<dyn Vcpu>,
    pub(crate) mask: Arc<StepMask>,
}

impl Vcpu for Stepped {
    fn run(&mut self, answer: Answer) -> Result<Exit, EngineError> {
        let exit = self.vcpu.run(answer)?;
        if exit == Exit::Halt {
            // A step over HLT ends with the interrupt that ends the HLT.
            self.mask.set(false);
        }
        Ok(exit)
    }

    fn state(&mut self) -> CpuState {
        self.vcpu.state()
    }

    fn glance(&mut self) -> Glance {
        self.vcpu.glance()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.vcpu.set_state(state)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.vcpu.kicker()
    }

    fn set_debug(&mut self, request: &DebugRequest) {
        self.mask.set(request.single_step);
        self.vcpu.set_debug(request);
    }

    fn translate(&mut self, linear: u64) -> Option<u64> {
        self.vcpu.translate(linear)
    }

    fn resumed(&mut self) {
        self.vcpu.resumed();
    }

    fn retired(&self) -> Option<u64> {
        self.vcpu.retired()
    }

    fn set_limit(&mut self, limit: Option<u64>) {
        self.vcpu.set_limit(limit);
    }

    fn on_taken(&mut self, told: Option<OnTaken>) {
        self.vcpu.on_taken(told);
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.vcpu.counters()
    }
}

#[cfg(test)]
mod tests {
    use super::StepMask;
    use std::sync::Arc;
    use wardian_irq::{Kick, LocalInterrupts, PendingEvents};

    struct Everything;
    impl LocalInterrupts for Everything {
        fn pending(&self) -> PendingEvents {
            PendingEvents { interrupt: true, nmi: true, init: true, startup: true }
        }
        fn acknowledge(&self) -> Option<u8> {
            Some(0x30)
        }
        fn take_nmi(&self) -> bool {
            true
        }
        fn take_init(&self) -> bool {
            true
        }
        fn take_startup(&self) -> Option<u8> {
            Some(8)
        }
        fn cr8(&self) -> u8 {
            0
        }
        fn set_cr8(&self, _priority: u8) {}
        fn apic_base(&self) -> u64 {
            0
        }
        fn attach(&self, _kick: Arc<dyn Kick>) {}
    }

    #[test]
    fn steps_hold_off_interrupts_but_not_init() {
        let mask = StepMask::new(Arc::new(Everything));
        assert!(mask.pending().interrupt && mask.take_nmi());
        mask.set(true);
        let pending = mask.pending();
        assert!(!pending.interrupt && !pending.nmi && pending.init && pending.startup);
        assert_eq!(mask.acknowledge(), None);
        assert!(!mask.take_nmi() && mask.take_init());
        assert_eq!(mask.take_startup(), Some(8));
        mask.set(false);
        assert_eq!(mask.acknowledge(), Some(0x30));
    }
}
