//! What an operator does to one life of the machine while it runs: buttons, and looking at it.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use wardian_bus::Bus;
use wardian_cpu::{CpuState, Vcpu};
use wardian_irq::{IrqChip, Kick, MsiMessage};

use crate::accounts::Phase;
use crate::board::Board;
use crate::control::Status;
use crate::tree::Tree;
use crate::vcpu::Look;
use crate::vm::Vm;

/// How often a vCPU that is asked is looked for at the gate, where it does not hear.
const LISTEN: Duration = Duration::from_millis(5);
/// So many times, then it is given up.
const PATIENCE: usize = 400;

/// What is on the front of the box.
pub(crate) struct Buttons {
    pub(crate) power: Box<dyn Fn() + Send + Sync>,
    pub(crate) chip: Arc<dyn IrqChip>,
}

impl Vm {
    /// What it is at.
    pub(crate) fn status(&self) -> Status {
        if self.gate().is_paused() {
            Status::Paused
        } else if self.gate().all_held() {
            Status::Held
        } else {
            Status::Running
        }
    }

    /// Presses the power button; says whether there still is one.
    pub(crate) fn press_power_button(&self) -> bool {
        self.buttons().map(|buttons| (buttons.power)()).is_some()
    }

    /// Sends an NMI to vCPU `index`; says whether there is one.
    pub(crate) fn nmi(&self, index: usize) -> bool {
        // Intel SDM vol. 3A, 11.11: destination in address bits 19:12, delivery mode 100b.
        let nmi = MsiMessage { address: 0xfee0_0000 | (index as u64) << 12, data: 0x400 };
        let there = index < self.slots().len();
        there && self.buttons().map(|buttons| buttons.chip.signal_msi(nmi)).is_some()
    }

    /// See [`crate::Control::look`].
    pub(crate) fn look<T: Send + 'static>(
        &self,
        index: usize,
        f: impl FnOnce(&mut dyn Vcpu) -> T + Send + 'static,
    ) -> Option<T> {
        let slot = self.slots().get(index)?;
        let (tell, told) = channel();
        let look = Look::new(Box::new(move |vcpu: &mut dyn Vcpu| drop(tell.send(f(vcpu)))));
        slot.ask(look.clone());
        self.gate().call(index);
        slot.wake.kick();
        for _ in 0..PATIENCE {
            match told.recv_timeout(LISTEN) {
                Ok(seen) => return Some(seen),
                // At the gate it does not hear, but there it can be seen.
                Err(_) => {
                    self.with_vcpu(index, &mut |vcpu| {
                        look.take(vcpu);
                    });
                }
            }
        }
        drop(look.cancel());
        // It may have begun to answer right now.
        told.recv_timeout(LISTEN).ok()
    }

    /// What vCPU `index` is doing, and the kind of its last exit.
    pub(crate) fn doing(&self, index: usize) -> Option<(&'static str, Option<&'static str>)> {
        let slot = self.slots().get(index)?;
        let phase = match slot.account.read().phase {
            Some(Phase::Guest) => "guest",
            Some(Phase::Exit) => "exit",
            Some(Phase::Halted) => "halted",
            Some(Phase::Resting) | None => "resting",
        };
        Some((phase, slot.last_exit()))
    }

    /// Devices, vCPUs and time as named values; `None` when the devices are gone.
    pub(crate) fn inspect(&self) -> Option<Tree> {
        let board = self.board()?;
        let mut tree = Tree::default();
        tree.put("devices", devices(&board));
        for index in 0..self.slots().len() {
            tree.put(&format!("vcpus/{index}"), self.inspect_vcpu(index));
        }
        let time = self.queue().base();
        tree.put("time/now_ns", time.now().0);
        tree.put("time/timeline_ns", time.timeline().0);
        tree.put("time/running", time.is_running());
        tree.put("time/counted", time.is_counted());
        tree.put("memory/size", self.memory().size());
        for (n, range) in self.memory().ranges().iter().enumerate() {
            tree.put(
                &format!("memory/region{n}"),
                format!("{:#x}+{:#x}", range.start, range.end - range.start),
            );
        }
        tree.put("status", Tree::of(&self.status()));
        Some(tree)
    }

    fn inspect_vcpu(&self, index: usize) -> Tree {
        let mut tree = Tree::default();
        if let Some((phase, last)) = self.doing(index) {
            tree.put("phase", phase);
            tree.put("last_exit", last.unwrap_or("none"));
        }
        if let Some(slot) = self.slots().get(index) {
            tree.put("time", Tree::of(&slot.account.time_spent()));
            let pending = slot.local.pending();
            tree.put("pending/interrupt", pending.interrupt);
            tree.put("pending/nmi", pending.nmi);
            tree.put("pending/init", pending.init);
            tree.put("pending/startup", pending.startup);
        }
        let seen = self.look(index, |vcpu| {
            let counters: Vec<_> = vcpu.counters();
            (vcpu.state(), vcpu.glance().interrupts, vcpu.retired(), counters)
        });
        if let Some((state, interrupts, retired, counters)) = seen {
            tree.put("registers", registers(&state));
            tree.put("interrupts", interrupts);
            if let Some(retired) = retired {
                tree.put("retired", retired);
            }
            for (name, value) in counters {
                tree.put(&format!("engine/{name}"), value);
            }
        }
        tree
    }
}

/// Every device once, by its name; further ones of the same name are numbered.
fn devices(board: &Board) -> Tree {
    let (ports, memory) = (&board.ports, &board.mmio);
    let mut tree = Tree::default();
    let mut known: Vec<(String, Tree)> = Vec::new();
    let named = |(bus, unit): (&Bus, &'static str)| {
        let all = bus
            .regions()
            .map(move |(range, device)| (format!("{unit}{:#x}", range.start), Arc::clone(device)));
        all.collect::<Vec<_>>()
    };
    for (place, device) in [(ports, "port-"), (memory, "memory-")].into_iter().flat_map(named) {
        let (name, values) = (device.name().to_owned(), Tree::from_list(device.inspect()));
        // A device with several regions tells the same at each of them.
        if known.iter().any(|(other, seen)| *other == name && *seen == values) {
            continue;
        }
        let again = known.iter().any(|(other, _)| *other == name);
        let path = if again { format!("{name}@{place}") } else { name.clone() };
        tree.put(&path, values.clone());
        known.push((name, values));
    }
    tree
}

/// The registers of a vCPU in words.
fn registers(state: &CpuState) -> Tree {
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];
    let mut tree = Tree::default();
    let mut put = |name: &str, value: u64| tree.put(name, format!("{value:#x}"));
    NAMES.iter().zip(state.gpr).for_each(|(name, value)| put(name, value));
    let others = [
        ("rip", state.rip),
        ("rflags", state.rflags),
        ("cr0", state.cr0),
        ("cr2", state.cr2),
        ("cr3", state.cr3),
        ("cr4", state.cr4),
        ("cr8", state.cr8),
        ("efer", state.efer),
        ("xcr0", state.xcr0),
        ("tsc_adjust", state.tsc_adjust),
    ];
    others.iter().for_each(|(name, value)| put(name, *value));
    for (name, value) in ["dr0", "dr1", "dr2", "dr3", "dr6", "dr7"].iter().zip(state.dr) {
        put(name, value);
    }
    for msr in &state.msrs {
        put(&format!("msr/{:#x}", msr.index), msr.value);
    }
    let segments = ["es", "cs", "ss", "ds", "fs", "gs"].iter().zip(&state.segments);
    for (name, segment) in segments.chain([(&"ldtr", &state.ldtr), (&"tr", &state.tr)]) {
        put(&format!("{name}/selector"), segment.selector.into());
        put(&format!("{name}/base"), segment.base);
        put(&format!("{name}/limit"), segment.limit.into());
        put(&format!("{name}/rights"), segment.rights.into());
    }
    for (name, table) in [("gdtr", &state.gdtr), ("idtr", &state.idtr)] {
        put(&format!("{name}/base"), table.base);
        put(&format!("{name}/limit"), table.limit.into());
    }
    tree.put("activity", format!("{:?}", state.activity).to_lowercase());
    tree.put("interrupt_shadow", state.interrupt_shadow);
    tree.put("nmi_blocked", state.nmi_blocked);
    tree
}
