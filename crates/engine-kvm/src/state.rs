//! [`CpuState`] out of a vCPU of KVM and into it, in the order in which the parts depend on each other.

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_debugregs, kvm_dtable, kvm_regs,
    kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use wardian_cpu::{Activity, CpuState, DescriptorTable, EngineError, Msr, Segment};

use crate::KvmError;

/// Bytes of state components that KVM hands over in one piece.
const XSAVE_LEN: usize = 4096;

/// What of a state is KVM's; the rest is the vCPU's own.
pub(crate) struct Own {
    pub(crate) msrs: Vec<Msr>,
    pub(crate) tsc_adjust: u64,
    pub(crate) activity: Activity,
    pub(crate) cr8: u8,
}

fn segment(from: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u32| u32::from(value & 1) << at;
    Segment {
        selector: from.selector,
        base: from.base,
        limit: from.limit,
        rights: u32::from(from.type_ & 15)
            | bit(from.s, 4)
            | u32::from(from.dpl & 3) << 5
            | bit(from.present, 7)
            | bit(from.avl, 12)
            | bit(from.l, 13)
            | bit(from.db, 14)
            | bit(from.g, 15)
            | bit(from.unusable, 16),
    }
}

fn to_kvm(from: &Segment) -> kvm_segment {
    let bit = |at: u32| (from.rights >> at & 1) as u8;
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: from.kind() as u8,
        present: bit(7),
        dpl: from.dpl(),
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: bit(16),
        padding: 0,
    }
}

fn table(from: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: from.base, limit: from.limit }
}

fn table_to_kvm(from: DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: from.base, limit: from.limit, padding: [0; 3] }
}

/// The general registers in encoding order.
fn gpr(regs: &kvm_regs) -> [u64; 16] {
    [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ]
}

fn gpr_to_kvm(gpr: [u64; 16], rip: u64, rflags: u64) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = gpr;
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

/// The whole state.
pub(crate) fn save(fd: &VcpuFd, own: Own) -> Result<CpuState, KvmError> {
    let get = KvmError::call;
    let regs = fd.get_regs().map_err(get("to say the registers"))?;
    let sregs = fd.get_sregs().map_err(get("to say the system registers"))?;
    let debug = fd.get_debug_regs().map_err(get("to say the debug registers"))?;
    let xsave = fd.get_xsave().map_err(get("to say the state components"))?;
    let xcrs = fd.get_xcrs().map_err(get("to say XCR0"))?;
    let events = fd.get_vcpu_events().map_err(get("to say the events"))?;
    let xcr0 =
        xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|xcr| xcr.xcr == 0).map_or(1, |xcr| xcr.value);
    Ok(CpuState {
        gpr: gpr(&regs),
        rip: regs.rip,
        rflags: regs.rflags,
        segments: [&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs].map(segment),
        ldtr: segment(&sregs.ldt),
        tr: segment(&sregs.tr),
        gdtr: table(&sregs.gdt),
        idtr: table(&sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: u64::from(own.cr8),
        efer: sregs.efer,
        xcr0,
        dr: [debug.db[0], debug.db[1], debug.db[2], debug.db[3], debug.dr6, debug.dr7],
        xsave: xsave.region.iter().flat_map(|word| word.to_le_bytes()).collect(),
        msrs: own.msrs,
        tsc_adjust: own.tsc_adjust,
        activity: own.activity,
        interrupt_shadow: events.interrupt.shadow != 0,
        nmi_blocked: events.nmi.masked != 0,
        nmi_owed: events.nmi.injected != 0 || events.nmi.pending != 0,
        // An INT n that was not delivered is executed again, and so is what raised an exception.
        interrupt_owed: (events.interrupt.injected != 0 && events.interrupt.soft == 0)
            .then_some(events.interrupt.nr),
    })
}

/// Replaces the whole state but the model-specific registers.
pub(crate) fn restore(fd: &VcpuFd, state: &CpuState, apic_base: u64) -> Result<(), EngineError> {
    let set = KvmError::call;
    let [es, cs, ss, ds, fs, gs] = state.segments.each_ref().map(to_kvm);
    let sregs = kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: to_kvm(&state.tr),
        ldt: to_kvm(&state.ldtr),
        gdt: table_to_kvm(state.gdtr),
        idt: table_to_kvm(state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: state.cr8 & 15,
        efer: state.efer,
        apic_base,
        interrupt_bitmap: [0; 4],
    };
    fd.set_sregs(&sregs).map_err(set("the system registers of the state"))?;
    fd.set_regs(&gpr_to_kvm(state.gpr, state.rip, state.rflags))
        .map_err(set("the registers of the state"))?;
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = state.xcr0;
    if state.xcr0 != fd.get_xcrs().map_or(0, |now| now.xcrs[0].value) {
        fd.set_xcrs(&xcrs).map_err(set("XCR0 of the state"))?;
    }
    if state.xsave.len() > XSAVE_LEN && state.xsave[XSAVE_LEN..].iter().any(|byte| *byte != 0) {
        return Err(EngineError::Host(
            "the state has state components that KVM is not asked to carry".into(),
        ));
    }
    let mut xsave = kvm_xsave::default();
    for (to, from) in xsave.region.iter_mut().zip(state.xsave.chunks_exact(4)) {
        *to = u32::from_le_bytes([from[0], from[1], from[2], from[3]]);
    }
    #[allow(unsafe_code)]
    // SAFETY: the engine permits no dynamically enabled state component, so the kernel reads 4096 bytes at most.
    unsafe {
        fd.set_xsave(&xsave).map_err(set("the state components of the state"))?;
    }
    let [d0, d1, d2, d3, dr6, dr7] = state.dr;
    let debug = kvm_debugregs { db: [d0, d1, d2, d3], dr6, dr7, ..Default::default() };
    fd.set_debug_regs(&debug).map_err(set("the debug registers of the state"))?;
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    // MOV SS or STI: the kernel knows which by bit, and either holds interrupts off.
    events.interrupt.shadow = u8::from(state.interrupt_shadow);
    events.nmi.masked = u8::from(state.nmi_blocked);
    events.nmi.pending = u8::from(state.nmi_owed);
    if let Some(vector) = state.interrupt_owed {
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
    }
    fd.set_vcpu_events(&events).map_err(set("the events of the state"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_survive_the_way_there_and_back() {
        for rights in [0x9b, 0xa09b, 0xc0f3, 0x8b, 0x82, 1 << 16, 0x1_f0ff] {
            let before = Segment { selector: 0x33, base: 0x1234_5678_9abc, limit: 0xffff_ffff, rights };
            assert_eq!(segment(&to_kvm(&before)), before, "{rights:#x}");
        }
    }

    #[test]
    fn registers_keep_their_places() {
        let numbers = std::array::from_fn(|n| n as u64);
        let regs = gpr_to_kvm(numbers, 100, 2);
        assert_eq!((regs.rsp, regs.rdi, regs.rbx, regs.r15, regs.rip, regs.rflags), (4, 7, 3, 15, 100, 2));
        assert_eq!(gpr(&regs), numbers);
    }
}
