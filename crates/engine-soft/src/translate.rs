//! The translator: guest instructions to host instructions, one superblock at a time.
//!
//! A superblock is decoded through not-taken conditional jumps until a jump, call, return, interpreted
//! instruction, page end or [`MAX_INSNS`]. Instructions are copied byte for byte with their registers mapped and
//! their memory operand replaced by `[r14 + r13]` after a TLB probe. See `engine.md`, "The design".
//!
//! **Flags.** At every block entry the architectural flags are in the context's slot. Inside a block they are in the
//! slot, in EFLAGS or in both ([`Loc`]); they are saved before the first probe that would lose flags somebody
//! may still read, and restored before an instruction that reads them. A target on the same page whose code
//! overwrites all flags before reading any needs none (peek-ahead).
//!
//! Control flow, stack operations and cold stubs are emitted in [`flow`], system instructions in [`system`], everything
//! else in [`native`].

mod flow;
mod native;
mod system;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic as M, OpKind, RflagsBits};
use wardian_memory::PAGE_SIZE;

use crate::access::{Site, is_canonical};
use crate::bases::{self, Base};
use crate::blocks::{Block, BlockId, Blocks, Mark};
use crate::code::{CODE_LEN, COLD_START, CodeMemory, MARGIN};
use crate::core::Core;
use crate::ctx::{self, Leave, View};
use crate::decode::{Class, CodeInfo, CodeTable, Unit};
use crate::emit::{Cursor, reg::T0, reg::T1};
use crate::mode::Mode;
use crate::sys::straight::Straight;
use crate::thunks::{self, Thunks};
use crate::trap::Result;

/// Most instructions in a superblock.
pub const MAX_INSNS: usize = 64;
/// Bytes that are looked at first.
const GLIMPSE: usize = 128;
/// Most instructions that are looked ahead for flags.
const PEEK: usize = 8;
const ALL_FLAGS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Where the architectural flags are while a block is emitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loc {
    Slot,
    Eflags,
    Both,
}

#[derive(Clone)]
struct Op {
    insn: Instruction,
    info: CodeInfo,
    /// Offset of the bytes in the buffer.
    start: usize,
    reads: u32,
    kills: u32,
    modifies: u32,
    /// Flags that somebody may read after this instruction (on the path that falls through).
    live_after: u32,
    /// ... on the taken edge.
    live_taken: u32,
}

impl Op {
    fn live_before(&self) -> u32 {
        (self.live_after & !self.kills) | self.reads | self.live_taken
    }
}

/// What a cold stub does.
#[derive(Clone, Copy)]
enum Cold {
    Access {
        /// Displacement of the `ja` (or `jmp`) that leads here.
        site: u32,
        access: Site,
        /// Tag table to take off again; `None`: R13 holds the address.
        tag: Option<i32>,
        /// Hot code to go back to, and for writes the hot bytes to be repeated before the commit.
        back: u32,
        tail: Option<(u32, Next, bool)>,
        /// Instructions of the block that are counted and not retired yet, this one included.
        left: u8,
    },
    Edge {
        site: u32,
        target: u64,
        save: bool,
        /// Instructions that were counted and are jumped over.
        left: u8,
    },
    /// The block was counted and is not run.
    Budget { site: u32, count: u8, rip: u64 },
    /// Leave to the run loop at an instruction.
    Quit { site: u32, why: Leave, rip: u64 },
    /// The compare of an edge to another page did not find `target`'s.
    Link { site: u32, compare: u32, target: u64 },
    /// Load the upper vector registers.
    High { site: u32, back: u32 },
}

/// Where a committed write goes on if translated code must be left.
#[derive(Clone, Copy)]
enum Next {
    Linear(u64),
    Scratch,
}

/// The translator of one vCPU and what it has translated.
pub struct Translator {
    pub code: CodeMemory,
    pub thunks: Thunks,
    pub blocks: Blocks,
    table: CodeTable,
    /// Blocks take their instructions from the budget. To be changed only when there are none.
    pub counting: bool,
    /// Blocks leave for whatever translated code does not run itself. Likewise.
    pub plain: bool,
    hot: u32,
    cold: u32,
    desk: Desk,
}

/// Linear memory bytes that a superblock is decoded from, and how many they are.
struct Source {
    bytes: [u8; 1024 + 16],
    len: usize,
}

/// What is needed for one translation at a time, kept for the next.
#[derive(Default)]
struct Desk {
    source: Option<Box<Source>>,
    ops: Vec<Op>,
    cold: Vec<Cold>,
}

struct Emit<'a> {
    c: Cursor<'a>,
    mode: Mode,
    thunks: Thunks,
    loc: Loc,
    cold: &'a mut Vec<Cold>,
    marks: Vec<Mark>,
    cold_marks: Vec<Mark>,
    page_linear: u64,
    /// Base of the page, if the block floats.
    base: Base,
    chainable: bool,
    /// Where instructions are counted: how many of the block are not retired yet, the present one included.
    left: u8,
    /// Number that the block will have.
    id: BlockId,
    moved: i32,
    /// Not where instructions are counted: what is interpreted counts itself in the run loop.
    straight: Option<&'a mut Straight>,
}

impl Translator {
    pub fn new(ram_pages: usize) -> std::result::Result<Translator, wardian_cpu::EngineError> {
        let mut code = CodeMemory::new()?;
        let thunks = thunks::write(&mut code)?;
        Ok(Translator {
            code,
            thunks,
            blocks: Blocks::new(ram_pages),
            table: CodeTable::new(),
            counting: false,
            plain: false,
            hot: thunks.end,
            cold: COLD_START,
            desk: Desk::default(),
        })
    }

    /// Bytes of code in use.
    pub fn used(&self) -> u32 {
        (self.hot - self.thunks.end) + (self.cold - COLD_START)
    }

    /// Whether another superblock fits.
    pub fn has_room(&self) -> bool {
        self.hot + MARGIN < COLD_START && self.cold + MARGIN < CODE_LEN
    }

    /// Forgets every translation. No pointer into the code may be used after this.
    pub fn clear(&mut self) {
        self.blocks.clear();
        self.hot = self.thunks.end;
        self.cold = COLD_START;
    }

    /// Makes blocks that depend on `granules` of RAM page `page` unreachable.
    pub fn invalidate(&mut self, page: u32, granules: u64) -> usize {
        let mut count = 0;
        let (code, lookup) = (&mut self.code, self.thunks.leave[Leave::Lookup as usize]);
        self.blocks.kill(page, granules, |block| {
            count += 1;
            jump_at(code, block.landing, lookup);
            jump_at(code, block.head, block.attention);
        });
        count
    }

    /// Has the jump at `site`, which cannot be chained, go to `target` by the jump cache.
    pub fn detour(&mut self, site: u32, target: u64, view: View) {
        if !self.has_room() {
            return;
        }
        let at = self.cold;
        let mut c = Cursor::new(&mut self.code, at);
        c.mov_imm(T0, target);
        c.jump_slot(ctx::jumps(view), ctx::jump_slot(target));
        self.cold = c.pos();
        c.memory().patch(site, at);
    }

    /// Has the edge whose compare is at `compare` lead to the floating block at `head`, in the page of `base`.
    pub fn link(&mut self, compare: u32, base: Base, head: u32) {
        // cmp r13, [rbp + d32]; jne d32; jmp d32
        self.code.put(compare, &bases::disp(base).to_le_bytes());
        self.code.patch(compare + 11, head);
    }

    /// Translates the superblock at `linear`. `stops`: addresses that no block may run into.
    ///
    /// # Errors
    /// The fetch's page fault.
    pub fn translate(&mut self, core: &mut Core, linear: u64, mode: Mode, stops: &[u64]) -> Result<BlockId> {
        let mut desk = std::mem::take(&mut self.desk);
        let done = self.translate_on(&mut desk, core, linear, mode, stops);
        self.desk = desk;
        done
    }

    fn translate_on(
        &mut self,
        desk: &mut Desk,
        core: &mut Core,
        linear: u64,
        mode: Mode,
        stops: &[u64],
    ) -> Result<BlockId> {
        let floating = bases::floats(mode, linear) && stops.is_empty();
        let Desk { source, ops, cold } = desk;
        let source: &mut Source = source.get_or_insert_with(|| Box::new(Source { bytes: [0; 1040], len: 0 }));
        loop {
            let fetch = core.fetch_page(linear)?;
            let offset = (linear & (PAGE_SIZE - 1)) as usize;
            // Most blocks are short, and what lies behind them is not in the host's cache.
            for most in [GLIMPSE, 1024] {
                source.len = (4096 - offset).min(most);
                read_host(fetch.host + offset, &mut source.bytes[..source.len]);
                ops.clear();
                self.decode(source, linear, mode, stops, ops);
                if ops.last().is_some_and(|op| op.start + op.insn.len() + 15 <= source.len) {
                    break;
                }
            }
            let mut second = None;
            if ops.is_empty() {
                // The first instruction reaches into the next page.
                let next = core.fetch_page((linear | 0xfff).wrapping_add(1))?;
                read_host(next.host, &mut source.bytes[source.len..source.len + 16]);
                let first = source.len;
                source.len += 16;
                ops.clear();
                self.decode(source, linear, mode, stops, ops);
                ops.truncate(1);
                second = Some((next, first));
            }
            if let Some(at) = (0..ops.len()).find(|at| {
                let system = ops[*at].info.class == Class::System;
                system && (self.counting || system::misplaced(ops, *at))
            }) {
                ops.truncate(at + 1);
                let op = &mut ops[at];
                op.info.class = Class::Interpret;
                (op.reads, op.kills, op.modifies) = (ALL_FLAGS, 0, 0);
            }
            let used = ops.last().map_or(1, |op: &Op| op.start + op.insn.len());
            let peeked = self.liveness(ops, fetch.host, linear, mode, second.is_none());

            // Mark first, then look whether somebody wrote in between.
            let on_first = second.map_or(used, |(_, first)| first.min(used));
            let mut granules = granule_mask(offset, offset + on_first);
            core.mark_translated(fetch.page, fetch.host, offset..offset + on_first);
            if let Some(range) = peeked {
                granules |= granule_mask(range.0, range.1);
                core.mark_translated(fetch.page, fetch.host, range.0..range.1);
            }
            if let Some((next, first)) = second
                && used > first
            {
                core.mark_translated(next.page, next.host, 0..used - first);
            }
            let mut unchanged = same_host(fetch.host + offset, &source.bytes[..on_first]);
            if let Some((next, first)) = second
                && used > first
            {
                unchanged &= same_host(next.host, &source.bytes[first..used]);
            }
            if !unchanged {
                continue;
            }

            let mut block = Blocks::blank(fetch.page as u32, offset as u16, linear, mode);
            block.granules = granules;
            block.page2 = second.map(|(next, _)| next.page as u32);
            if floating {
                let mut base = |page, linear| {
                    let base = core.bases.of(&mut core.ctx, page);
                    core.bases.bind(&mut core.ctx, base, linear);
                    base
                };
                block.base = base(fetch.page, linear & !0xfff);
                block.base2 = second.map_or(0, |(next, _)| base(next.page, (linear | 0xfff) + 1));
            }
            core.counters.translations += 1;
            core.counters.translated_instructions += ops.len() as u64;
            self.emit(core, &mut block, ops, (&*source, used), cold);
            let crossing = second
                .filter(|(_, first)| used > *first)
                .map(|(next, first)| (next.page as u32, granule_mask(0, used - first)));
            let (head, forward) = (block.head, block.chainable());
            let (id, old) = self.blocks.add(block);
            if let Some((page, granules)) = crossing {
                self.blocks.add_crossing(id, page, granules);
            }
            if let Some(old) = old
                && forward
            {
                // Jumps that were chained to the old block go on to the new one.
                let old_head = self.blocks.all[old as usize].head;
                jump_at(&mut self.code, old_head, head);
            }
            return Ok(id);
        }
    }

    fn decode(&mut self, source: &Source, linear: u64, mode: Mode, stops: &[u64], ops: &mut Vec<Op>) {
        let ip = mode.ip(linear);
        let mut decoder =
            Decoder::with_ip(mode.bitness(), &source.bytes[..source.len], ip, DecoderOptions::NONE);
        let limit = if mode.single() { 1 } else { MAX_INSNS };
        while ops.len() < limit {
            let start = decoder.position();
            if start >= source.len {
                return;
            }
            if !ops.is_empty()
                && !stops.is_empty()
                && stops.contains(&mode.linear(ip.wrapping_add(start as u64)))
            {
                return;
            }
            let insn = decoder.decode();
            let info = if insn.is_invalid() {
                if decoder.last_error() == DecoderError::NoMoreBytes && source.len - start < 15 {
                    return;
                }
                CodeInfo { class: Class::Interpret, ..CodeInfo::default() }
            } else {
                treatment(&mut self.table, &insn, mode)
            };
            let class = info.class;
            let mut op = Op {
                reads: insn.rflags_read() & ALL_FLAGS,
                kills: (insn.rflags_written()
                    | insn.rflags_cleared()
                    | insn.rflags_set()
                    | insn.rflags_undefined())
                    & ALL_FLAGS,
                modifies: insn.rflags_modified() & ALL_FLAGS,
                insn,
                info,
                start,
                live_after: 0,
                live_taken: 0,
            };
            if info.by_cl {
                op.reads |= op.modifies;
                op.kills = 0;
            }
            if matches!(class, Class::Interpret) {
                (op.reads, op.kills, op.modifies) = (ALL_FLAGS, 0, 0);
            }
            let ends = class == Class::System && system::ends(&op.insn, mode);
            ops.push(op);
            match class {
                Class::System if ends => return,
                Class::Interpret
                | Class::JmpNear
                | Class::JmpIndirect
                | Class::CallNear
                | Class::CallIndirect
                | Class::Ret => return,
                _ => {}
            }
        }
    }

    /// Fills in which flags are live where; returns the range of page offsets that was looked at beyond the block.
    fn liveness(
        &mut self,
        ops: &mut [Op],
        host: usize,
        linear: u64,
        mode: Mode,
        peek: bool,
    ) -> Option<(usize, usize)> {
        let page = linear & !0xfff;
        let mut seen: Option<(usize, usize)> = None;
        let mut live_at = |this: &mut Translator, target: u64| -> u32 {
            if !peek || mode.single() || target & !0xfff != page {
                return ALL_FLAGS;
            }
            let offset = (target & 0xfff) as usize;
            let (live, end) = this.peek(host, offset, target, mode);
            let range = seen.get_or_insert((offset, end));
            range.0 = range.0.min(offset);
            range.1 = range.1.max(end);
            live
        };
        let last = ops.last()?;
        let end = mode.linear(mode.ip(linear).wrapping_add((last.start + last.insn.len()) as u64));
        let mut live = match last.info.class {
            Class::JmpNear | Class::CallNear => {
                let target = mode.linear(last.insn.near_branch_target());
                live_at(self, target)
            }
            Class::Interpret | Class::JmpIndirect | Class::CallIndirect | Class::Ret => ALL_FLAGS,
            _ => live_at(self, end),
        };
        for op in ops.iter_mut().rev() {
            op.live_after = live;
            if matches!(op.info.class, Class::Jcc | Class::Loop | Class::Jrcxz) {
                op.live_taken = live_at(self, mode.linear(op.insn.near_branch_target()));
            }
            live = op.live_before();
        }
        seen
    }

    /// Which flags may be read from `target` on before they are written; and where the look ended (page offset).
    fn peek(&mut self, host: usize, offset: usize, target: u64, mode: Mode) -> (u32, usize) {
        let mut bytes = [0u8; 64];
        let len = (4096 - offset).min(64);
        read_host(host + offset, &mut bytes[..len]);
        let mut decoder =
            Decoder::with_ip(mode.bitness(), &bytes[..len], mode.ip(target), DecoderOptions::NONE);
        let (mut pending, mut live) = (ALL_FLAGS, 0);
        for _ in 0..PEEK {
            let insn = decoder.decode();
            if insn.is_invalid() {
                break;
            }
            let info = self.table.get(&insn);
            live |= insn.rflags_read() & pending;
            match info.class {
                Class::Native
                | Class::Nothing
                | Class::Lea
                | Class::PushReg
                | Class::PushImm
                | Class::PopReg
                | Class::Leave => {}
                _ => break,
            }
            if !info.by_cl {
                pending &= !(insn.rflags_written()
                    | insn.rflags_cleared()
                    | insn.rflags_set()
                    | insn.rflags_undefined());
            }
            if pending == 0 {
                return (live, offset + decoder.position());
            }
        }
        (live | pending, (offset + decoder.position()).max(offset + 1).min(4096))
    }

    /// Emits `block`, whose bytes are the first `used` of `source`; `cold`: an empty list.
    fn emit(
        &mut self,
        core: &mut Core,
        block: &mut Block,
        ops: &[Op],
        (source, used): (&Source, usize),
        cold: &mut Vec<Cold>,
    ) {
        let hot = (self.hot + 15) & !15;
        self.code.prepare(hot, self.cold);
        let mode = block.mode;
        let lookup = self.thunks.leave[Leave::Lookup as usize];
        let mut e = Emit {
            c: Cursor::new(&mut self.code, hot),
            mode,
            thunks: self.thunks,
            loc: Loc::Slot,
            cold,
            marks: Vec::new(),
            cold_marks: Vec::new(),
            page_linear: block.linear & !0xfff,
            base: block.base,
            chainable: block.page2.is_none() && !mode.single(),
            left: 0,
            id: self.blocks.all.len() as BlockId,
            moved: 0,
            straight: (!self.counting && !self.plain).then_some(&mut core.straight),
        };
        // Landing: is this the address that the jump wanted?
        block.landing = e.c.pos();
        let linear = block.linear;
        if block.base != 0 {
            e.c.lea(T1, Some(T0), None, -(i32::from(block.offset)), true);
            e.c.cmp_base(T1, block.base);
        } else if linear as i64 == i64::from(linear as i32) {
            e.c.put(&[0x49, 0x81, 0xfd]); // cmp r13, imm32
            e.c.put(&(linear as u32).to_le_bytes());
        } else {
            e.c.mov_imm(T1, linear);
            e.c.put(&[0x4d, 0x39, 0xf5]); // cmp r13, r14
        }
        e.c.jcc(5, lookup);
        block.head = e.c.pos();
        e.c.cmp_attention();
        e.c.put(&[0x0f, 0x85]);
        let attention_site = e.c.pos();
        e.c.put(&[0; 4]);
        block.body = e.c.pos();
        if block.base2 != 0 {
            // Does the other page still follow? (The flags are in their slot here.)
            e.c.load_base(T1, block.base);
            e.c.add(T1, 4096, true);
            e.c.cmp_base(T1, block.base2);
            e.c.put(&[0x0f, 0x85]);
            let site = e.c.pos();
            e.c.put(&[0; 4]);
            e.cold.push(Cold::Quit { site, why: Leave::Lookup, rip: linear });
        }
        if self.counting {
            // What is interpreted counts itself.
            let translated = |op: &&Op| !matches!(op.info.class, Class::Unknown | Class::Interpret);
            e.left = ops.iter().filter(translated).count() as u8;
            if e.left != 0 {
                let site = e.c.take(e.left);
                e.cold.push(Cold::Budget { site, count: e.left, rip: linear });
            }
        }
        let evex = |op: &&Op| op.info.class == Class::Native && op.info.unit == Unit::Evex;
        if ops.iter().filter(evex).any(|op| op.info.wide) {
            e.c.widen();
        }
        if ops.iter().any(|op| evex(&op)) {
            // The flags are in their slot here.
            let site = e.c.need_high();
            let back = e.c.pos();
            e.cold.push(Cold::High { site, back });
        }
        let mut ended = false;
        for op in ops {
            ended = e.op(op, source);
            e.left = e.left.saturating_sub(1);
        }
        if !ended {
            let next = mode.linear(mode.ip(linear).wrapping_add(used as u64));
            let live = ops.last().map_or(ALL_FLAGS, |op| op.live_after);
            e.go(next, live);
        }
        block.end = e.c.pos();
        block.moved = e.moved;
        block.repeatable = ops.iter().all(|op| repeatable(op.insn.mnemonic()));
        block.last = ops.last().map_or(linear, |op| mode.linear(op.insn.ip()));
        // Cold stubs.
        let cold_at = (self.cold + 15) & !15;
        e.c.seek(cold_at);
        block.attention = e.c.pos();
        e.c.memory().patch(attention_site, cold_at);
        e.leave(Leave::Attention, linear);
        // (Stubs may add others.)
        let mut next = 0;
        while let Some(item) = e.cold.get(next).copied() {
            e.cold_stub(item);
            next += 1;
        }
        e.cold.clear();
        let cold_end = e.c.pos();
        let (marks, cold_marks) = (std::mem::take(&mut e.marks), std::mem::take(&mut e.cold_marks));
        self.hot = block.end;
        self.cold = cold_end;
        self.blocks.marks[0].extend(marks);
        self.blocks.marks[1].extend(cold_marks);
    }
}

/// Whether an instruction does the same whenever it is run.
fn repeatable(mnemonic: M) -> bool {
    !matches!(mnemonic, M::Rdtsc | M::Rdtscp | M::Rdrand | M::Rdseed | M::Rdpid | M::Rdpmc)
}

/// Writes `jmp target` at `at`.
fn jump_at(code: &mut CodeMemory, at: u32, target: u32) {
    let mut bytes = [0xe9, 0, 0, 0, 0];
    bytes[1..].copy_from_slice(&target.wrapping_sub(at.wrapping_add(5)).to_le_bytes());
    code.put(at, &bytes);
}

fn granule_mask(start: usize, end: usize) -> u64 {
    let (first, last) = (start / 64, (end.max(start + 1) - 1) / 64);
    (u64::MAX >> (63 - last.min(63))) & (u64::MAX << first.min(63))
}

/// Copies guest RAM bytes.
fn read_host(host: usize, out: &mut [u8]) {
    // SAFETY: callers pass an address inside a RAM page and a length that stays in it; the guest may write
    // meanwhile, which is noticed by comparing again after marking.
    unsafe { std::ptr::copy_nonoverlapping(host as *const u8, out.as_mut_ptr(), out.len()) };
}

/// Whether guest RAM still holds `bytes`.
fn same_host(host: usize, bytes: &[u8]) -> bool {
    let mut again = [0u8; 64];
    bytes.chunks(64).enumerate().all(|(n, chunk)| {
        let again = &mut again[..chunk.len()];
        read_host(host + n * 64, again);
        again == chunk
    })
}

/// Whether `unit` is switched off in `mode`.
pub fn gated(unit: Unit, mode: Mode) -> bool {
    match unit {
        Unit::Integer => false,
        Unit::X87 => mode.fpu_off(),
        Unit::Sse => mode.fpu_off() || mode.sse_off(),
        Unit::Avx => mode.fpu_off() || mode.avx_off(),
        Unit::Evex => mode.fpu_off() || mode.evex_off(),
    }
}

/// Whether `insn`, one for the interpreter, is valid and its unit switched on in `mode`.
fn straight(insn: &Instruction, info: CodeInfo, mode: Mode) -> bool {
    let off = gated(info.unit, mode) || (insn.mnemonic() == M::Wait && mode.wait_off());
    !insn.is_invalid() && !off
}

/// How `insn` is treated in `mode`: its attributes, with the class that the mode allows.
pub fn treatment(table: &mut CodeTable, insn: &Instruction, mode: Mode) -> CodeInfo {
    let mut info = table.get(insn);
    let wait = insn.mnemonic() == M::Wait && mode.wait_off();
    if wait || (info.class != Class::Nothing && gated(info.unit, mode)) {
        info.class = Class::Interpret;
    }
    adapt(insn, &mut info, mode);
    let direct =
        matches!(info.class, Class::JmpNear | Class::CallNear | Class::Jcc | Class::Loop | Class::Jrcxz);
    if direct && mode.code64() && !is_canonical(insn.near_branch_target()) {
        info.class = Class::Interpret;
    }
    if info.class == Class::Interpret && straight(insn, info, mode) && system::emitted(insn, mode) {
        info.class = Class::System;
    }
    info
}

/// Takes back classes that the mode does not allow to be emitted.
fn adapt(insn: &Instruction, info: &mut CodeInfo, mode: Mode) {
    let emitted = match info.class {
        Class::PushReg | Class::PushImm | Class::PopReg | Class::Leave => {
            // Only stack operations of the mode's own size.
            let moved = insn.stack_pointer_increment().unsigned_abs();
            let word = insn.op_count() > 0 && insn.op0_register().size() == 2;
            let own = moved.is_multiple_of(if mode.code64() { 8 } else { 4 });
            mode.stack_native() && own && !word && !operand16(insn)
        }
        Class::CallNear | Class::CallIndirect | Class::Ret => mode.stack_native() && !operand16(insn),
        Class::JmpIndirect => mode.near_native() && !operand16(insn),
        Class::JmpNear | Class::Jcc | Class::Loop | Class::Jrcxz => {
            let natural = match mode.bitness() {
                16 => OpKind::NearBranch16,
                32 => OpKind::NearBranch32,
                _ => OpKind::NearBranch64,
            };
            insn.op0_kind() == natural && counter_size(insn) != 2
        }
        Class::Native if info.mem_read || info.mem_write => {
            crate::access::SIZES.contains(&(insn.memory_size().size() as u16)) && !insn.is_vsib()
        }
        _ => true,
    };
    if !emitted {
        info.class = Class::Interpret;
    }
}

/// Size of the counter of LOOP and JrCXZ: by the address size. 8 for others.
fn counter_size(insn: &Instruction) -> usize {
    use iced_x86::Code as C;
    match insn.code() {
        C::Loop_rel8_16_CX | C::Loop_rel8_32_CX | C::Jcxz_rel8_16 | C::Jcxz_rel8_32 => 2,
        C::Loop_rel8_16_ECX
        | C::Loop_rel8_32_ECX
        | C::Loop_rel8_64_ECX
        | C::Jecxz_rel8_16
        | C::Jecxz_rel8_32
        | C::Jecxz_rel8_64 => 4,
        _ => 8,
    }
}

fn operand16(insn: &Instruction) -> bool {
    let op = insn.code().op_code();
    op.operand_size() == 16
}
