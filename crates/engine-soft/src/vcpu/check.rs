//! The check mode: a superblock is run as a whole, taken back, and run again one instruction at a time; registers and
//! memory must be the same.
//!
//! A block's first runs are checked, later ones ever more seldom. What a run wrote is known by page: no page may be
//! written before its bytes were kept ([`Undo`]). A device may write meanwhile, so a difference counts only if it
//! comes back.

use std::sync::atomic::Ordering;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic as M, Register, RflagsBits as F};
use wardian_cpu::bits::rflags;

use super::SoftVcpu;
use crate::access::is_canonical;
use crate::bases;
use crate::blocks::BlockId;
use crate::core::{Core, System};
use crate::ctx::Leave;
use crate::fpu;
use crate::mode::Mode;
use crate::tlb::Flush;
use crate::translate::MAX_INSNS;

/// A block's first runs are checked, then those whose number is a power of two.
const FIRST_RUNS: u32 = 3;
/// A difference must come back so often.
const ATTEMPTS: usize = 4;
/// Instructions that are looked at for flags that nobody reads.
const LOOK: usize = 64;
const ALL: u32 = F::OF | F::SF | F::ZF | F::AF | F::CF | F::PF;
const SHIFTS: [M; 10] = [M::Shl, M::Shr, M::Sar, M::Sal, M::Rol, M::Ror, M::Rcl, M::Rcr, M::Shld, M::Shrd];
const PAGE: usize = 4096;

/// What was checked so far.
#[derive(Default)]
pub struct Check {
    /// Runs of each block.
    runs: Vec<u32>,
    /// What begins here was taken back, and is run for good next. (It may change itself, and be another block then.)
    pass: Option<u64>,
    /// Runs that were compared.
    pub compared: u64,
    /// Runs that ended in the midst of an instruction and were taken back.
    pub taken_back: u64,
    /// Differences that did not come back.
    pub disturbed: u64,
    /// The difference that ends the machine.
    pub differs: Option<String>,
}

impl Check {
    /// Blocks are numbered anew.
    pub fn forget(&mut self) {
        self.runs.clear();
    }

    fn due(&mut self, id: BlockId) -> bool {
        let at = id as usize;
        if self.runs.len() <= at {
            self.runs.resize(at + 1, 0);
        }
        self.runs[at] = self.runs[at].saturating_add(1);
        self.runs[at] <= FIRST_RUNS || self.runs[at].is_power_of_two()
    }
}

/// A page of guest RAM, copied.
type Bytes = Box<[u8; PAGE]>;

/// Pages as they were before a run wrote them.
#[derive(Default)]
pub struct Undo {
    pages: Vec<(usize, Bytes)>,
}

impl Undo {
    /// The RAM page at `host` is about to be written.
    pub fn keep(&mut self, host: usize) {
        if self.pages.iter().all(|(kept, _)| *kept != host) {
            self.pages.push((host, read(host)));
        }
    }

    fn now(&self) -> Vec<(usize, Bytes)> {
        self.pages.iter().map(|(host, _)| (*host, read(*host))).collect()
    }

    fn take_back(&self) {
        for (host, before) in &self.pages {
            let now = read(*host);
            for (at, byte) in before.iter().enumerate().filter(|(at, byte)| now[*at] != **byte) {
                write(host + at, *byte);
            }
        }
    }
}

fn read(host: usize) -> Bytes {
    let mut bytes = Box::new([0; PAGE]);
    // SAFETY: callers pass the host address of a live RAM page; racing device writes only make bytes unspecified.
    unsafe { std::ptr::copy_nonoverlapping(host as *const u8, bytes.as_mut_ptr(), PAGE) };
    bytes
}

fn write(host: usize, byte: u8) {
    // SAFETY: an address in a RAM page that was kept.
    unsafe { (host as *mut u8).write_volatile(byte) };
}

#[derive(Clone)]
#[repr(C, align(64))]
struct Image([u8; 512]);

/// Everything that a block may change besides memory.
#[derive(Clone)]
struct Registers {
    gpr: [u64; 16],
    flags: u64,
    slot: u32,
    rip: u64,
    rflags: u64,
    seg_base: [u64; 6],
    kernel_gs_base: u64,
    mode: Mode,
    held: u32,
    vec_mode: u32,
    vec: [[u8; 64]; 32],
    mask: [u64; 8],
    x87: Image,
    sys: System,
}

impl Registers {
    fn of(core: &Core) -> Registers {
        let mut x87 = Image([0; 512]);
        fpu::store_x87(x87.0.as_mut_ptr());
        let c = core.c();
        Registers {
            gpr: c.gpr,
            flags: core.rflags() & rflags::ARITH,
            slot: c.flags,
            rip: c.rip,
            rflags: c.rflags,
            seg_base: c.seg_base,
            kernel_gs_base: c.kernel_gs_base,
            mode: c.mode,
            held: c.held,
            vec_mode: c.vec_mode,
            vec: c.vec,
            mask: c.mask,
            x87,
            sys: core.sys.clone(),
        }
    }

    fn put(&self, core: &mut Core) {
        fpu::load_x87(self.x87.0.as_ptr());
        core.sys = self.sys.clone();
        let c = core.ctx.get_mut();
        (c.gpr, c.flags, c.rip, c.rflags) = (self.gpr, self.slot, self.rip, self.rflags);
        (c.seg_base, c.kernel_gs_base) = (self.seg_base, self.kernel_gs_base);
        (c.mode, c.held, c.vec_mode, c.vec, c.mask) =
            (self.mode, self.held, self.vec_mode, self.vec, self.mask);
        c.high_live = 0;
        core.mode_dirty = true;
    }

    /// What of a block's registers (`self`) is not as after its single instructions, where the arithmetic flags `live`
    /// count.
    fn difference(&self, single: &Registers, live: u64) -> Option<String> {
        const NAMES: [&str; 16] = [
            "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13",
            "R14", "R15",
        ];
        let mut words = vec![("RIP", self.rip, single.rip)];
        words.extend((0..16).map(|n| (NAMES[n], self.gpr[n], single.gpr[n])));
        words.push(("the arithmetic flags", self.flags & live, single.flags & live));
        words.push(("RFLAGS", self.rflags, single.rflags));
        words.push(("the base of GS", self.kernel_gs_base, single.kernel_gs_base));
        words.extend(self.seg_base.iter().zip(single.seg_base).map(|(a, b)| ("a segment base", *a, b)));
        words.extend(self.mask.iter().zip(single.mask).map(|(a, b)| ("a mask register", *a, b)));
        if let Some((name, block, single)) = words.into_iter().find(|(_, a, b)| a != b) {
            return Some(format!("{name} is {block:#x}, by single instructions {single:#x}"));
        }
        let width = 16 << self.vec_mode.min(single.vec_mode).min(2);
        for n in 0..32 {
            let (len, a, b) = (if n < 16 { width } else { width.max(32) }, &self.vec[n], &single.vec[n]);
            if a[..len] != b[..len] {
                return Some(format!(
                    "vector register {n} is {:02x?}, by single instructions {:02x?}",
                    &a[..len],
                    &b[..len]
                ));
            }
        }
        // Control, status and tag word; MXCSR; ST0-ST7. The pointers between show where translated code lies.
        let x87 = [(0..2, "FCW"), (2..4, "FSW"), (4..5, "FTW"), (24..28, "MXCSR")].into_iter();
        let stack = (0..8).map(|n| (32 + n * 16..42 + n * 16, "an x87 register"));
        x87.chain(stack).find_map(|(range, name)| {
            let (a, b) = (&self.x87.0[range.clone()], &single.x87.0[range]);
            (a != b).then(|| format!("{name} is {a:02x?}, by single instructions {b:02x?}"))
        })
    }
}

/// What became of a check.
pub(super) enum Checked {
    /// Nothing was run.
    No,
    /// The block has been run.
    Done,
    /// The machine ends: [`Check::differs`].
    Differs,
}

impl SoftVcpu {
    /// Checks every block from now on.
    pub(crate) fn check_blocks(&mut self) {
        self.forget_code();
        self.translator.plain = true;
        self.check = Some(Box::default());
    }

    /// Runs block `id`, which begins at RIP, both ways, if it is due.
    pub(super) fn checked(&mut self, id: BlockId) -> Checked {
        let quiet = self.core.c().attention.load(Ordering::Acquire) == 0
            && self.core.c().rflags & (rflags::TF | rflags::RF) == 0
            && self.core.journal.is_empty()
            && self.core.watch.is_empty()
            && self.stops.is_empty()
            && !self.core.alone
            && !self.core.mode().single()
            && !self.translator.counting;
        let block = &self.translator.blocks.all[id as usize];
        let (linear, body) = (self.core.c().rip, block.body);
        let last = bases::settled(&self.core.ctx, block.base, block.last);
        let due = |check: &mut Check| check.pass.take() != Some(linear) && check.due(id);
        if !quiet || !block.repeatable || !self.check.as_deref_mut().is_some_and(due) {
            return Checked::No;
        }
        let before = Registers::of(&self.core);
        let mut differs = String::new();
        // Bytes that only one of the two runs changed: by itself, or a device did.
        let mut strange: Vec<(usize, u8, u8)> = Vec::new();
        for attempt in 0..ATTEMPTS {
            self.core.undo = Some(Box::default());
            self.core.flush_tlb(Flush::All);
            // (What the flush took from floating code is found again.)
            if !self.block().is_ok_and(|found| found == id) {
                self.core.undo = None;
                return Checked::No;
            }
            self.enter(body);
            let leave = self.core.c().leave;
            let ends = [Leave::Chain, Leave::Lookup, Leave::Edge, Leave::Interpret];
            let whole = ends.iter().any(|l| leave == *l as u32);
            let rip = self.core.c().rip;
            if !whole || !self.core.out.is_empty() || self.core.mode().code64() && !is_canonical(rip) {
                self.take_back(&before);
                self.core.undo = None;
                self.core.flush_tlb(Flush::All);
                if let Some(check) = &mut self.check {
                    check.taken_back += 1;
                    check.pass = Some(linear);
                }
                // A write that was taken back may have been told of as one of code; that does no harm.
                return Checked::No;
            }
            let of_block = Registers::of(&self.core);
            let memory = self.core.undo.as_ref().map_or_else(Vec::new, |undo| undo.now());
            self.take_back(&before);
            self.core.flush_tlb(Flush::All);
            let until = (leave == Leave::Interpret as u32).then_some(rip);
            let went = self.one_by_one(last, until);
            let single = Registers::of(&self.core);
            let live = if until == Some(last) { rflags::ARITH } else { self.live(rip) };
            let found = match went {
                Err(why) => Some(why),
                Ok(undefined) => of_block.difference(&single, live & !undefined),
            };
            let (other, bytes) = self.other_bytes(&memory);
            let found = found.or(other);
            let Some(found) = found else {
                self.core.undo = None;
                self.core.flush_tlb(Flush::All);
                self.core.mode_dirty = true;
                // What a device wrote in an earlier attempt was taken back with the rest.
                for (at, before, after) in strange {
                    if read_byte(at) == before {
                        write(at, after);
                    }
                }
                if let Some(check) = &mut self.check {
                    check.compared += 1;
                    check.disturbed += u64::from(attempt > 0);
                }
                return Checked::Done;
            };
            differs = format!("{found}, at the exit to {rip:#x} ({})", self.bytes_of(rip, rip));
            strange.extend(bytes);
            self.take_back(&before);
        }
        self.core.undo = None;
        let bytes = self.bytes_of(linear, last);
        if let Some(check) = &mut self.check {
            check.differs = Some(format!("The superblock at {linear:#x} ({bytes}) differs: {differs}"));
        }
        Checked::Differs
    }

    /// Registers and memory as before the run, and nothing left over of it.
    fn take_back(&mut self, before: &Registers) {
        if let Some(undo) = &self.core.undo {
            undo.take_back();
        }
        before.put(&mut self.core);
        self.core.trap = None;
        self.core.commit = None;
        self.core.out.clear();
        self.core.journal.clear();
    }

    /// Runs single instructions up to and with that at `last`, the first that goes elsewhere, or to `until`. Tells the
    /// arithmetic flags that they leave undefined: in a block, these may be any.
    fn one_by_one(&mut self, last: u64, until: Option<u64>) -> Result<u64, String> {
        let slowly = std::mem::replace(&mut self.slowly, true);
        let went = self.steps(last, until);
        self.slowly = slowly;
        self.core.mode_dirty = true;
        went
    }

    fn steps(&mut self, last: u64, until: Option<u64>) -> Result<u64, String> {
        let mut undefined = 0;
        for _ in 0..=MAX_INSNS {
            let at = self.core.c().rip;
            if until == Some(at) {
                return Ok(rflags_of(undefined));
            }
            self.core.mode_dirty = true;
            self.core.sys.interrupt_shadow = false;
            let id = self.block().map_err(|trap| format!("the fetch at {at:#x} stops by {trap:?}"))?;
            let insn = self.decode_any().map_err(|trap| format!("{at:#x} does not decode: {trap:?}"))?;
            let next = self.core.mode().linear(insn.next_ip());
            undefined &= !(insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set());
            undefined |= insn.rflags_undefined();
            let body = self.translator.blocks.all[id as usize].body;
            self.enter(body);
            let leave = self.core.c().leave;
            if leave == Leave::Interpret as u32 {
                match self.interpret() {
                    Ok(true) => {}
                    other => return Err(format!("{at:#x} alone stops by {other:?}")),
                }
            } else if leave != Leave::Completed as u32 {
                return Err(format!("{at:#x} alone leaves by {leave}: {:?}", self.core.trap));
            }
            if !self.core.out.is_empty() {
                return Err(format!("{at:#x} alone goes to a device"));
            }
            if at == last || self.core.c().rip != next {
                return Ok(rflags_of(undefined));
            }
        }
        Err("single instructions do not come to the block's end".into())
    }

    /// Bytes that differ from those after the block's run, and the first of them in words.
    fn other_bytes(&self, memory: &[(usize, Bytes)]) -> (Option<String>, Vec<(usize, u8, u8)>) {
        let (mut told, mut bytes) = (None, Vec::new());
        for (host, before) in self.core.undo.iter().flat_map(|undo| &undo.pages) {
            let now = read(*host);
            // A page that the block did not write is as before.
            let after = memory.iter().find(|(other, _)| other == host).map_or(before, |(_, after)| after);
            for at in (0..PAGE).filter(|&at| now[at] != after[at]) {
                told.get_or_insert_with(|| {
                    format!(
                        "a byte at {at:#x} of a page was {:#x}, is {:#x}, by single instructions {:#x}",
                        before[at], after[at], now[at]
                    )
                });
                let changed = if after[at] == before[at] { now[at] } else { after[at] };
                bytes.push((host + at, before[at], changed));
            }
        }
        (told, bytes)
    }

    /// Arithmetic flags that may be read from `rip` on, as far as its page tells.
    fn live(&mut self, rip: u64) -> u64 {
        let Ok(fetch) = self.core.fetch_page(rip) else { return rflags::ARITH };
        let page = read(fetch.host);
        let mut left = LOOK;
        rflags_of(self.live_in(&*page, rip, ALL, 4, &mut left))
    }

    /// Which of the flags `pending` may be read from `rip` on; `depth`: through so many more jumps.
    fn live_in(&self, page: &[u8], rip: u64, mut pending: u32, depth: u32, left: &mut usize) -> u32 {
        let mode = self.core.mode();
        let offset = (rip & 0xfff) as usize;
        let mut decoder =
            Decoder::with_ip(mode.bitness(), &page[offset..], mode.ip(rip), DecoderOptions::NONE);
        let mut live = 0;
        while *left > 0 && pending != 0 {
            *left -= 1;
            let insn = decoder.decode();
            if insn.is_invalid() {
                break;
            }
            live |= insn.rflags_read() & pending;
            // A shift by CL may leave all as they were.
            let by_cl = (0..insn.op_count()).any(|n| n > 0 && insn.op_register(n) == Register::CL);
            let shift = by_cl && SHIFTS.contains(&insn.mnemonic());
            if !shift {
                pending &= !(insn.rflags_written()
                    | insn.rflags_cleared()
                    | insn.rflags_set()
                    | insn.rflags_undefined());
            }
            let target = mode.linear(insn.near_branch_target());
            match insn.flow_control() {
                FlowControl::Next => continue,
                FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
                    if depth > 0 && target & !0xfff == rip & !0xfff =>
                {
                    live |= self.live_in(page, target, pending, depth - 1, left);
                    if insn.flow_control() == FlowControl::ConditionalBranch {
                        continue;
                    }
                    return live;
                }
                _ => break,
            }
        }
        live | pending
    }

    fn bytes_of(&mut self, linear: u64, last: u64) -> String {
        let Ok(fetch) = self.core.fetch_page(linear) else { return "gone".into() };
        let page = read(fetch.host);
        let from = (linear & 0xfff) as usize;
        let to = (from + (last.wrapping_sub(linear) as usize).min(PAGE) + 48).min(PAGE);
        page[from..to].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The decoder's names of arithmetic flags as bits of RFLAGS.
fn rflags_of(bits: u32) -> u64 {
    [
        (F::CF, rflags::CF),
        (F::PF, rflags::PF),
        (F::AF, rflags::AF),
        (F::ZF, rflags::ZF),
        (F::SF, rflags::SF),
        (F::OF, rflags::OF),
    ]
    .into_iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |all, (_, flag)| all | flag)
}

fn read_byte(host: usize) -> u8 {
    // SAFETY: an address in a RAM page that was kept.
    unsafe { (host as *const u8).read_volatile() }
}

#[cfg(test)]
mod tests {
    use wardian_memory::{Gpa, GuestMemory};

    use super::*;

    #[test]
    fn differences_are_told() {
        let mut core = Core::for_test(GuestMemory::new(1 << 20).unwrap());
        let block = Registers::of(&core);
        assert_eq!(block.difference(&block.clone(), rflags::ARITH), None);
        core.set_gpr(3, 7);
        let told = block.difference(&Registers::of(&core), rflags::ARITH);
        assert_eq!(told.as_deref(), Some("RBX is 0x0, by single instructions 0x7"));
        block.put(&mut core);
        core.set_rflags(rflags::ZF);
        let other = Registers::of(&core);
        assert!(block.difference(&other, rflags::ARITH).is_some_and(|told| told.contains("flags")));
        assert_eq!(block.difference(&other, rflags::ARITH & !rflags::ZF), None, "nobody reads ZF");
        block.put(&mut core);
        core.ctx.get_mut().vec[5][15] = 1;
        assert!(block.difference(&Registers::of(&core), 0).is_some_and(|told| told.contains("register 5")));
        block.put(&mut core);
        assert_eq!(block.difference(&Registers::of(&core), rflags::ARITH), None);
    }

    #[test]
    fn writes_are_taken_back() {
        let mem = GuestMemory::new(1 << 20).unwrap();
        let (_, host) = mem.page(Gpa(0x3000)).unwrap();
        mem.write(Gpa(0x3008), &[1, 2, 3, 4]).unwrap();
        let mut undo = Undo::default();
        undo.keep(host);
        mem.write(Gpa(0x3009), &[9, 9]).unwrap();
        undo.keep(host);
        assert_eq!(undo.now()[0].1[8..12], [1, 9, 9, 4]);
        undo.take_back();
        let mut bytes = [0; 4];
        mem.read(Gpa(0x3008), &mut bytes).unwrap();
        assert_eq!(bytes, [1, 2, 3, 4]);
    }

    #[test]
    fn first_runs_and_then_ever_fewer() {
        let mut check = Check::default();
        let due: Vec<u32> = (1..=20).filter(|_| check.due(3)).collect();
        assert_eq!(due.len(), [1, 2, 3, 4, 8, 16].len());
        check.forget();
        assert!(check.due(3));
    }
}
