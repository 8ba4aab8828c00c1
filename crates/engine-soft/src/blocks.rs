//! The book of translated blocks: by key, by RAM page, and the marks by which host faults find their way back.

use crate::bases::Base;
use crate::mode::Mode;

/// Number of a block.
pub type BlockId = u32;
const NONE: u32 = u32::MAX;

/// One superblock.
#[derive(Clone, Debug)]
pub struct Block {
    /// RAM page and offset of the first instruction.
    pub page: u32,
    pub offset: u16,
    pub mode: Mode,
    /// Linear address of the first instruction; where it was translated, if it floats.
    pub linear: u64,
    /// Base of its page, if it floats.
    pub base: Base,
    /// RAM page of the second part, if its one instruction crosses a page.
    pub page2: Option<u32>,
    /// Base of that, if the block floats.
    pub base2: Base,
    /// 64-byte granules of `page` that the translation depends on.
    pub granules: u64,
    /// Entry for indirect jumps: compares R13 first.
    pub landing: u32,
    /// Entry for chained jumps.
    pub head: u32,
    /// Entry past the attention check.
    pub body: u32,
    /// The stub that leaves with this block's address.
    pub attention: u32,
    /// First offset after the hot code.
    pub end: u32,
    /// Linear address of the last instruction, as `linear`.
    pub last: u64,
    /// What that adds to RSP if it is an indirect jump, call or return.
    pub moved: i32,
    /// Run again from the same state, it does the same.
    pub repeatable: bool,
    pub dead: bool,
    next_in_page: u32,
}

/// A host instruction that may fault, and what it means to the guest.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    pub host: u32,
    /// The arithmetic flags are in EFLAGS there.
    pub flags_live: bool,
    /// Where instructions are counted: how many of the block are not retired there.
    pub left: u8,
    /// Of a floating block: `rip` counts by its offset in the page of this base.
    pub base: Base,
    pub rip: u64,
}

/// What stands for the linear address in the key of a floating block.
pub const FLOATING: u64 = u64::MAX;

impl Block {
    fn key(&self) -> u64 {
        if self.base == 0 { self.linear } else { FLOATING }
    }

    /// Other blocks may jump to its head.
    pub fn chainable(&self) -> bool {
        self.page2.is_none() || self.base != 0
    }
}

/// All blocks of one vCPU.
pub struct Blocks {
    pub all: Vec<Block>,
    /// Open addressing: part of the key's hash, and the block.
    table: Vec<(u32, BlockId)>,
    pages: Vec<u32>,
    /// Blocks whose one instruction ends on another page: that page, granules there, block.
    crossing: Vec<(u32, u64, BlockId)>,
    /// Ascending by host offset: hot code, cold stubs.
    pub marks: [Vec<Mark>; 2],
}

/// 32 bits of a key's hash; the low ones say where it is looked for first.
fn hash(page: u32, offset: u16, key: u64, mode: Mode) -> u32 {
    let mixed =
        (u64::from(page) << 12 | u64::from(offset)) ^ key.rotate_left(20) ^ mode.hash().rotate_left(7);
    (mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
}

const FREE: (u32, BlockId) = (0, NONE);

impl Blocks {
    pub fn new(ram_pages: usize) -> Blocks {
        Blocks {
            all: Vec::new(),
            table: vec![FREE; 1 << 17],
            pages: vec![NONE; ram_pages],
            crossing: Vec::new(),
            marks: Default::default(),
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        for block in &self.all {
            self.pages[block.page as usize] = NONE;
        }
        self.all.clear();
        self.crossing.clear();
        self.table.fill(FREE);
        self.marks = Default::default();
    }

    fn slot(&self, hash: u32, page: u32, offset: u16, key: u64, mode: Mode) -> usize {
        let mask = self.table.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let (tag, id) = self.table[at];
            if id == NONE {
                return at;
            }
            if tag == hash {
                let b = &self.all[id as usize];
                if b.key() == key && b.page == page && b.offset == offset && b.mode == mode {
                    return at;
                }
            }
            at = (at + 1) & mask;
        }
    }

    /// The block for a key, dead or alive. `key`: the linear address or [`FLOATING`].
    pub fn find(&self, page: u32, offset: u16, key: u64, mode: Mode) -> Option<BlockId> {
        let (_, id) = self.table[self.slot(hash(page, offset, key, mode), page, offset, key, mode)];
        (id != NONE).then_some(id)
    }

    /// Adds a block, replacing a dead one of the same key (whose number is returned).
    pub fn add(&mut self, mut block: Block) -> (BlockId, Option<BlockId>) {
        let id = self.all.len() as u32;
        let hash = hash(block.page, block.offset, block.key(), block.mode);
        let at = self.slot(hash, block.page, block.offset, block.key(), block.mode);
        let (_, old) = self.table[at];
        block.next_in_page = self.pages[block.page as usize];
        self.pages[block.page as usize] = id;
        self.table[at] = (hash, id);
        self.all.push(block);
        if self.all.len() * 2 > self.table.len() {
            self.grow();
        }
        (id, (old != NONE).then_some(old))
    }

    fn grow(&mut self) {
        let new = vec![FREE; self.table.len() * 2];
        let mask = new.len() - 1;
        for entry in std::mem::replace(&mut self.table, new).into_iter().filter(|entry| entry.1 != NONE) {
            let mut at = entry.0 as usize & mask;
            while self.table[at].1 != NONE {
                at = (at + 1) & mask;
            }
            self.table[at] = entry;
        }
    }

    /// Marks the living blocks of `page` that depend on `granules` dead and hands each to `f`.
    pub fn kill(&mut self, page: u32, granules: u64, mut f: impl FnMut(&Block)) {
        let Some(head) = self.pages.get(page as usize).copied() else { return };
        let mut kept = NONE;
        let mut at = head;
        while at != NONE {
            let block = &mut self.all[at as usize];
            let next = block.next_in_page;
            if block.granules & granules != 0 {
                if !block.dead {
                    block.dead = true;
                    f(block);
                }
            } else {
                block.next_in_page = kept;
                kept = at;
            }
            at = next;
        }
        self.pages[page as usize] = kept;
        if self.crossing.iter().any(|c| c.0 == page && c.1 & granules != 0) {
            let all = &mut self.all;
            self.crossing.retain(|(at, mask, id)| {
                let hit = *at == page && mask & granules != 0;
                let block = &mut all[*id as usize];
                if hit && !block.dead {
                    block.dead = true;
                    f(block);
                }
                !hit
            });
        }
    }

    /// Notes that block `id` depends on `granules` of RAM page `page` too.
    pub fn add_crossing(&mut self, id: BlockId, page: u32, granules: u64) {
        self.crossing.push((page, granules, id));
    }

    /// Makes a new block that is not in any list yet.
    pub fn blank(page: u32, offset: u16, linear: u64, mode: Mode) -> Block {
        Block {
            page,
            offset,
            mode,
            linear,
            base: 0,
            page2: None,
            base2: 0,
            granules: 0,
            landing: 0,
            head: 0,
            body: 0,
            attention: 0,
            end: 0,
            last: linear,
            moved: 0,
            repeatable: false,
            dead: false,
            next_in_page: NONE,
        }
    }

    /// The mark of the host instruction at `host`.
    pub fn mark_at(&self, host: u32) -> Option<Mark> {
        self.marks
            .iter()
            .find_map(|marks| marks.binary_search_by_key(&host, |m| m.host).ok().map(|n| marks[n]))
    }
}
