//! What a debugger wants of a vCPU, by the processor's own means: single steps and its four debug registers. Guest
//! memory is never patched.

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_debug_exit_arch,
    kvm_guest_debug,
};
use kvm_ioctls::VcpuFd;
use wardian_cpu::bits::{rflags, vector};
use wardian_cpu::{DebugEvent, DebugRequest};

/// DR6: the four conditions, and single step.
const CONDITIONS: u64 = 15;
const STEP: u64 = 1 << 14;

/// What a debug register watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    Breakpoint(u64),
    Data { at: u64, kind: u64, len: u64 },
}

#[derive(Debug, Default)]
pub(crate) struct Debug {
    single_step: bool,
    /// More breakpoints than debug registers: every instruction is stepped and looked at.
    hunted: Vec<u64>,
    watches: Vec<Watch>,
    /// A breakpoint that was reported and is to be stepped over.
    pass: Option<u64>,
}

/// The debug registers for `request`, or as many as fit, and the breakpoints that found none.
fn allot(request: &DebugRequest) -> (Vec<Watch>, Vec<u64>) {
    let mut watches = Vec::new();
    for (start, len, on_read, _) in &request.watchpoints {
        // A debug register covers 1, 2, 4 or 8 aligned bytes; a range takes as many as it needs.
        let (mut at, end) = (*start, start.saturating_add(*len));
        while at < end {
            let fits = [8u64, 4, 2, 1].into_iter().find(|size| at % size == 0 && at + size <= end);
            let len = fits.unwrap_or(1);
            // There is no "read alone": both.
            watches.push(Watch::Data { at, kind: if *on_read { 3 } else { 1 }, len });
            at += len;
        }
    }
    if watches.len() > 4 {
        tracing::warn!("The processor has four debug registers: some watchpoints are left out");
        watches.truncate(4);
    }
    if request.breakpoints.len() > 4 - watches.len() {
        return (watches, request.breakpoints.clone());
    }
    watches.extend(request.breakpoints.iter().map(|at| Watch::Breakpoint(*at)));
    (watches, Vec::new())
}

impl Debug {
    fn on(&self) -> bool {
        self.single_step || !self.hunted.is_empty() || !self.watches.is_empty()
    }

    pub(crate) fn set(&mut self, fd: &VcpuFd, request: &DebugRequest) {
        self.single_step = request.single_step;
        (self.watches, self.hunted) = allot(request);
        let mut debug = kvm_guest_debug::default();
        if self.on() {
            debug.control = KVM_GUESTDBG_ENABLE;
            if self.single_step || !self.hunted.is_empty() {
                debug.control |= KVM_GUESTDBG_SINGLESTEP;
            }
            if !self.watches.is_empty() {
                debug.control |= KVM_GUESTDBG_USE_HW_BP;
            }
            let mut dr7 = 0x400;
            for (n, watch) in self.watches.iter().enumerate() {
                let (at, kind, size) = match *watch {
                    Watch::Breakpoint(at) => (at, 0, 0),
                    // LEN: 1, 2, 8, 4 bytes.
                    Watch::Data { at, kind, len } => (
                        at,
                        kind,
                        match len {
                            2 => 1,
                            4 => 3,
                            8 => 2,
                            _ => 0,
                        },
                    ),
                };
                debug.arch.debugreg[n] = at;
                dr7 |= 2 << (2 * n) | (kind | size << 2) << (16 + 4 * n);
            }
            debug.arch.debugreg[7] = dr7;
        }
        if let Err(error) = fd.set_guest_debug(&debug) {
            tracing::warn!(%error, "KVM refuses the debugger's conditions");
        }
    }

    /// Before the guest runs: a breakpoint that was reported is passed once.
    pub(crate) fn before(&mut self, fd: &VcpuFd) {
        if self.pass.take().is_some()
            && let Ok(mut regs) = fd.get_regs()
        {
            regs.rflags |= rflags::RF;
            let _ = fd.set_regs(&regs);
        }
    }

    /// KVM met a debug condition; `None`: it was the guest's own, or not one that was asked for.
    pub(crate) fn met(&mut self, fd: &VcpuFd, arch: &kvm_debug_exit_arch) -> Option<DebugEvent> {
        if arch.exception == u32::from(vector::DB) {
            let hit = (0..self.watches.len()).find(|n| arch.dr6 & CONDITIONS & 1 << n != 0);
            match hit.map(|n| self.watches[n]) {
                Some(Watch::Breakpoint(at)) => {
                    self.pass = Some(at);
                    return Some(DebugEvent::Breakpoint(at));
                }
                Some(Watch::Data { at, .. }) => return Some(DebugEvent::Watchpoint(at)),
                None => {}
            }
            if arch.dr6 & STEP != 0 && self.single_step {
                return Some(DebugEvent::Step);
            }
            if arch.dr6 & STEP != 0 && !self.hunted.is_empty() {
                return self.hunted.contains(&arch.pc).then_some(DebugEvent::Breakpoint(arch.pc));
            }
        }
        // The guest's own: it goes there.
        if let Ok(mut events) = fd.get_vcpu_events() {
            events.exception.injected = 1;
            events.exception.nr = arch.exception as u8;
            events.exception.has_error_code = 0;
            let _ = fd.set_vcpu_events(&events);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_registers_are_allotted() {
        let request = DebugRequest {
            single_step: false,
            breakpoints: vec![0x1000, 0x2000],
            watchpoints: vec![(0x3004, 12, false, true)],
        };
        let (watches, hunted) = allot(&request);
        assert_eq!(
            watches,
            [
                Watch::Data { at: 0x3004, kind: 1, len: 4 },
                Watch::Data { at: 0x3008, kind: 1, len: 8 },
                Watch::Breakpoint(0x1000),
                Watch::Breakpoint(0x2000),
            ]
        );
        assert!(hunted.is_empty());
        let many = DebugRequest { breakpoints: (0..5).collect(), ..DebugRequest::default() };
        assert_eq!(allot(&many), (vec![], vec![0, 1, 2, 3, 4]));
        let wide = DebugRequest { watchpoints: vec![(0, 64, true, true)], ..DebugRequest::default() };
        assert_eq!(allot(&wide).0.len(), 4);
    }
}
