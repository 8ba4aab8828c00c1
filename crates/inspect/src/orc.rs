//! ORC: the kernel's own tables for unwinding its stacks (Linux, Documentation/arch/x86/orc-unwinder.rst), and the
//! walk by them.

use crate::{Space, View};

const MAX_ENTRIES: u64 = 4 << 20;
/// Most frames of a stack.
pub(crate) const MAX_FRAMES: usize = 192;

/// How a frame's beginning is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Undefined,
    End,
    Call,
    Registers,
    /// Only what an interrupt pushes.
    Partial,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    sp_offset: i64,
    bp_offset: i64,
    sp: u8,
    bp: u8,
    kind: Kind,
}

/// Bases of offsets.
mod base {
    pub(super) const UNDEFINED: u8 = 0;
    pub(super) const PREVIOUS_SP: u8 = 1;
    pub(super) const DX: u8 = 2;
    pub(super) const DI: u8 = 3;
    pub(super) const BP: u8 = 4;
    pub(super) const SP: u8 = 5;
    pub(super) const R10: u8 = 6;
    pub(super) const R13: u8 = 7;
    pub(super) const BP_INDIRECT: u8 = 8;
    pub(super) const SP_INDIRECT: u8 = 9;
}

/// Code that has no entry, such as that of BPF and ftrace, keeps a frame pointer.
const BY_FRAME_POINTER: Entry =
    Entry { sp_offset: 16, bp_offset: -16, sp: base::BP, bp: base::PREVIOUS_SP, kind: Kind::Call };
/// A call of nothing: the return address is on top.
const NOWHERE: Entry =
    Entry { sp_offset: 8, bp_offset: 0, sp: base::SP, bp: base::UNDEFINED, kind: Kind::Call };

/// An ORC table.
#[derive(Clone, Debug)]
pub(crate) struct Orc {
    places: Vec<u64>,
    entries: Vec<[u8; 6]>,
    form: Form,
}

/// How an entry is written. The numbers of the registers changed with 7.x; nothing in the kernel says which they are
/// but the entries themselves: nearly all are based on the stack pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Form {
    bits: Bits,
    new_numbers: bool,
}

/// What the type of an entry says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bits {
    /// Bits of the kind.
    pub(crate) kind: u32,
    /// The bit of the last two bytes that says that the stack ends; newer kernels have a kind for that.
    pub(crate) end: Option<u32>,
}

impl Form {
    fn of(entries: &[[u8; 6]], bits: Bits) -> Form {
        let count = |number: u8| entries.iter().filter(|entry| entry[4] & 15 == number).count();
        Form { bits, new_numbers: count(3) > count(base::SP) }
    }

    /// The old number of a register; 15 for none that is known.
    fn register(self, number: u8) -> u8 {
        use base::{BP, BP_INDIRECT, DI, DX, PREVIOUS_SP, R10, R13, SP, SP_INDIRECT, UNDEFINED};
        const NEW: [u8; 11] =
            [UNDEFINED, 15, DX, SP, BP, DI, R10, R13, PREVIOUS_SP, SP_INDIRECT, BP_INDIRECT];
        if self.new_numbers { NEW.get(usize::from(number)).copied().unwrap_or(15) } else { number }
    }
}

impl Orc {
    /// Reads `count` entries, of the given form or of that which they seem to have.
    pub(crate) fn read(
        space: &Space<'_>,
        places: u64,
        entries: u64,
        count: u64,
        form: Result<Form, Bits>,
    ) -> Option<Orc> {
        if count == 0 || count > MAX_ENTRIES {
            return None;
        }
        let words = space.bytes(places, count * 4, 16 << 20)?;
        let own = |(index, word): (usize, &[u8; 4])| {
            let offset = i64::from(i32::from_le_bytes(*word));
            places.wrapping_add(index as u64 * 4).wrapping_add_signed(offset)
        };
        let places: Vec<u64> = words.as_chunks::<4>().0.iter().enumerate().map(own).collect();
        if !places.is_sorted() {
            return None;
        }
        let entries = space.bytes(entries, count * 6, 24 << 20)?;
        let entries = entries.as_chunks::<6>().0.to_vec();
        let form = form.unwrap_or_else(|bits| Form::of(&entries, bits));
        Some(Orc { places, entries, form })
    }

    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }

    fn find(&self, ip: u64) -> Option<Entry> {
        let index = self.places.partition_point(|place| *place <= ip).checked_sub(1)?;
        let entry = self.entries.get(index)?;
        let half = |at: usize| i16::from_le_bytes([entry[at], entry[at + 1]]);
        let bits = half(4).cast_unsigned();
        // Three bits since 6.4, with two kinds more at the beginning.
        let Bits { kind: kind_bits, end } = self.form.bits;
        let kind = match (kind_bits, bits >> 8 & ((1 << kind_bits.min(3)) - 1)) {
            (3, 0) => Kind::Undefined,
            (3, 1) => Kind::End,
            (3, 2) | (2, 0) => Kind::Call,
            (3, 3) | (2, 1) => Kind::Registers,
            (3, 4) | (2, 2) => Kind::Partial,
            _ => return None,
        };
        let (sp, bp) = (self.form.register((bits & 15) as u8), self.form.register((bits >> 4 & 15) as u8));
        let kind = match end {
            Some(end) if sp == base::UNDEFINED && bits >> end & 1 == 1 => Kind::End,
            _ if kind_bits == 2 && sp == base::UNDEFINED => Kind::Undefined,
            _ => kind,
        };
        Some(Entry { sp_offset: i64::from(half(0)), bp_offset: i64::from(half(2)), sp, bp, kind })
    }
}

/// Registers by which a stack is walked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// Next instruction.
    pub ip: u64,
    /// Stack pointer.
    pub sp: u64,
    /// Frame pointer.
    pub bp: u64,
    /// RDX, RDI, R10, R13, where they are known.
    pub others: Option<[u64; 4]>,
    /// `ip` is where it is, not where it returns to.
    pub exact: bool,
}

/// An address of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: u64,
    /// It is where something is, not where it returns to.
    pub exact: bool,
}

/// A kernel stack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelStack {
    /// The innermost first.
    pub frames: Vec<Address>,
    /// Where user mode was left, if the walk came so far.
    pub user: Option<Start>,
    /// It was walked to its end.
    pub whole: bool,
}

impl View<'_> {
    fn orc(&self) -> Option<&Orc> {
        let read = || {
            let symbols = self.kernel.symbols();
            let (first, end) =
                (symbols.address("__start_orc_unwind_ip")?, symbols.address("__stop_orc_unwind_ip")?);
            let entries = symbols.address("__start_orc_unwind")?;
            let bits = self.kernel.layout.orc?;
            Orc::read(&self.space, first, entries, end.checked_sub(first)? / 4, Err(bits))
        };
        self.kernel.orc.get_or_init(read).as_ref()
    }

    /// How the tables are written.
    pub(crate) fn orc_form(&self) -> Option<Form> {
        Some(self.orc()?.form)
    }

    /// Whether the kernel has ORC tables.
    #[must_use]
    pub fn has_orc(&self) -> bool {
        self.orc().is_some()
    }

    /// What the tables of the kernel or of a module say for `ip`; `None` if no code is there.
    fn entry(&self, ip: u64) -> Option<Entry> {
        if ip < 4096 {
            return Some(NOWHERE);
        }
        let symbols = self.kernel.symbols();
        let (start, end) = (symbols.address("_stext"), symbols.address("_etext"));
        if start.zip(end).is_some_and(|(start, end)| (start..end).contains(&ip)) {
            return self.orc()?.find(ip);
        }
        if let Some(module) = self.modules().iter().find(|module| module.holds(ip)) {
            return module.orc.as_ref()?.find(ip);
        }
        let leaf = self.space.walk(ip)?;
        leaf.executable.then_some(BY_FRAME_POINTER)
    }

    /// Walks a kernel stack by ORC.
    #[must_use]
    pub fn kernel_stack_by_orc(&self, start: Start) -> KernelStack {
        let mut stack = KernelStack::default();
        let mut now = start;
        for _ in 0..MAX_FRAMES {
            stack.frames.push(Address { ip: now.ip, exact: now.exact });
            let at = if now.exact { now.ip } else { now.ip.wrapping_sub(1) };
            let Some(entry) = self.entry(at) else { return stack };
            match self.step(now, entry) {
                Some(Step::Frame(next)) => {
                    // Nothing moves: a loop.
                    if (next.ip, next.sp) == (now.ip, now.sp) {
                        return stack;
                    }
                    now = next;
                }
                Some(Step::User(user)) => {
                    stack.user = Some(user);
                    stack.whole = true;
                    return stack;
                }
                Some(Step::End) => {
                    stack.whole = true;
                    return stack;
                }
                None => return stack,
            }
        }
        stack
    }

    fn step(&self, now: Start, entry: Entry) -> Option<Step> {
        match entry.kind {
            Kind::Undefined => return None,
            Kind::End => return Some(Step::End),
            _ => {}
        }
        let memory = &self.space;
        let other = |index: usize| now.others.map(|others| others[index]);
        let sp = match entry.sp {
            base::SP => now.sp.wrapping_add_signed(entry.sp_offset),
            base::BP => now.bp.wrapping_add_signed(entry.sp_offset),
            base::SP_INDIRECT => memory.u64(now.sp)?.wrapping_add_signed(entry.sp_offset),
            base::BP_INDIRECT => memory.u64(now.bp.wrapping_add_signed(entry.sp_offset))?,
            base::DX => other(0)?,
            base::DI => other(1)?,
            base::R10 => other(2)?,
            base::R13 => other(3)?,
            _ => return None,
        };
        let previous = |bp: Option<u64>| match entry.bp {
            base::PREVIOUS_SP => memory.u64(sp.wrapping_add_signed(entry.bp_offset)),
            base::BP => memory.u64(now.bp.wrapping_add_signed(entry.bp_offset)),
            _ => Some(bp.unwrap_or(now.bp)),
        };
        match entry.kind {
            Kind::Call => {
                let ip = memory.u64(sp.wrapping_sub(8))?;
                Some(Step::Frame(Start { ip, sp, bp: previous(None)?, others: None, exact: false }))
            }
            Kind::Registers => {
                let registers = SavedRegisters::read(memory, sp)?;
                let bp = previous(Some(registers.0[4]))?;
                Some(registers.step(bp))
            }
            Kind::Partial => {
                // Only RIP, CS, RFLAGS, RSP and SS are there: what is below is not.
                let word = |index: u64| memory.u64(sp.wrapping_add(index * 8));
                let start =
                    Start { ip: word(0)?, sp: word(3)?, bp: previous(None)?, others: None, exact: true };
                Some(if word(1)? & 3 == 3 { Step::User(start) } else { Step::Frame(start) })
            }
            Kind::Undefined | Kind::End => None,
        }
    }

    /// Walks a kernel stack by frame pointers.
    #[must_use]
    pub fn kernel_stack_by_frame_pointer(&self, start: Start) -> KernelStack {
        let mut stack = KernelStack::default();
        let memory = &self.space;
        let (mut now, mut exact) = (start, start.exact);
        for _ in 0..MAX_FRAMES {
            stack.frames.push(Address { ip: now.ip, exact });
            if now.bp & 1 == 1 {
                // An entry marks its registers so.
                let Some(registers) = SavedRegisters::read(memory, now.bp - 1) else { return stack };
                match registers.step(registers.0[4]) {
                    Step::Frame(next) => (now, exact) = (next, true),
                    Step::User(user) => {
                        (stack.user, stack.whole) = (Some(user), true);
                        return stack;
                    }
                    Step::End => return stack,
                }
                continue;
            }
            let frame = memory.u64(now.bp).zip(memory.u64(now.bp.wrapping_add(8)));
            let Some((bp, ip)) = frame.filter(|_| now.bp & 7 == 0) else { return stack };
            let inside = self.space.walk(ip).is_some_and(|leaf| leaf.executable && !leaf.user);
            if !inside || bp != 0 && bp & !1 <= now.bp {
                return stack;
            }
            (now, exact) = (Start { ip, sp: now.bp.wrapping_add(16), bp, others: None, exact: false }, false);
        }
        stack
    }
}

enum Step {
    Frame(Start),
    User(Start),
    End,
}

/// `pt_regs` (Linux, arch/x86/include/asm/ptrace.h): R15, R14, R13, R12, RBP, RBX, R11, R10, R9, R8, RAX, RCX, RDX,
/// RSI, RDI, original RAX, RIP, CS, RFLAGS, RSP, SS.
pub(crate) struct SavedRegisters([u64; 21]);

impl SavedRegisters {
    pub(crate) const SIZE: u64 = 21 * 8;

    pub(crate) fn read(space: &Space<'_>, at: u64) -> Option<SavedRegisters> {
        let mut bytes = [0; 21 * 8];
        space.read(at, &mut bytes)?;
        let mut words = [0; 21];
        for (word, chunk) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*chunk);
        }
        Some(SavedRegisters(words))
    }

    /// From user mode.
    pub(crate) fn user(&self) -> bool {
        self.0[17] & 3 == 3
    }

    pub(crate) fn start(&self, bp: u64) -> Start {
        Start {
            ip: self.0[16],
            sp: self.0[19],
            bp,
            others: Some([self.0[12], self.0[14], self.0[7], self.0[2]]),
            exact: true,
        }
    }

    pub(crate) fn bp(&self) -> u64 {
        self.0[4]
    }

    fn step(&self, bp: u64) -> Step {
        let start = self.start(bp);
        if self.user() {
            return Step::User(start);
        }
        if start.ip == 0 { Step::End } else { Step::Frame(start) }
    }
}

#[cfg(test)]
mod tests {
    use super::{Bits, Entry, Form, Kind, Orc, base};

    fn one(bits: u16, form: Form) -> Option<Entry> {
        let [low, high] = bits.to_le_bytes();
        Orc { places: vec![0x1000], entries: vec![[16, 0, 0xf0, 0xff, low, high]], form }.find(0x1234)
    }

    #[test]
    fn entries_of_all_three_forms() {
        let old = Form { bits: Bits { kind: 2, end: Some(10) }, new_numbers: false };
        let entry = one(0x0015, old).unwrap();
        assert_eq!((entry.sp, entry.bp, entry.kind), (base::SP, base::PREVIOUS_SP, Kind::Call));
        assert_eq!((entry.sp_offset, entry.bp_offset), (16, -16));
        assert_eq!(one(0x0105, old).unwrap().kind, Kind::Registers);
        assert_eq!(one(0x0400, old).unwrap().kind, Kind::End);
        assert_eq!(one(0x0000, old).unwrap().kind, Kind::Undefined);
        let middle = Form { bits: Bits { kind: 3, end: None }, new_numbers: false };
        assert_eq!(one(0x0215, middle).unwrap().kind, Kind::Call);
        assert_eq!(one(0x0100, middle).unwrap().kind, Kind::End);
        assert!(one(0x0715, middle).is_none());
        let new = Form { new_numbers: true, ..middle };
        let entry = one(0x0283, new).unwrap();
        assert_eq!((entry.sp, entry.bp), (base::SP, base::PREVIOUS_SP));
        assert_eq!(one(0x02ff, new).unwrap().sp, 15, "a register that nobody knows");
    }

    #[test]
    fn the_stack_pointer_tells_the_numbering() {
        let bits = Bits { kind: 3, end: None };
        let table = |sp: u8| vec![[8, 0, 0, 0, sp, 2]; 9];
        assert!(!Form::of(&table(5), bits).new_numbers);
        assert!(Form::of(&table(3), bits).new_numbers);
    }
}
