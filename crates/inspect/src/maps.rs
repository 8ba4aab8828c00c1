//! Address-space maps with file paths.

use std::collections::{HashMap, HashSet};

use serde::Serialize;

use crate::kernel::KERNEL_HALF;
use crate::{Space, View};

/// Most areas of an address space (vm.max_map_count is 65530).
const MAX_AREAS: usize = 1 << 16;
const MAX_NODES: usize = 1 << 14;
/// Most files of an address space whose paths are told.
const MAX_FILES: usize = 4096;
const MAX_DEPTH: usize = 10;
/// Longest path, in parts and in bytes.
const MAX_PARTS: usize = 256;
const MAX_PATH: usize = 4096;
const MAX_NAME: usize = 255;

/// An area of an address space.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Area {
    /// First address.
    pub start: u64,
    /// Address behind it.
    pub end: u64,
    /// VM_READ 1, VM_WRITE 2, VM_EXEC 4, VM_MAYSHARE 80h and others (Linux, include/linux/mm.h).
    pub flags: u64,
    /// Bytes behind the beginning of the file.
    pub offset: u64,
    /// The file, if there is one.
    pub file: Option<MappedFile>,
    /// What it is called: the file's path, `[heap]`, `[stack]`, `[vdso]`, `[vvar]` and its like, or nothing.
    pub name: String,
}

/// A file behind an area.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MappedFile {
    /// Address of its `struct file`.
    #[serde(skip)]
    pub address: u64,
    /// Device: major, minor.
    pub device: (u32, u32),
    /// Number on the device.
    pub inode: u64,
}

impl Area {
    /// `rwxp`, as /proc/PID/maps has it.
    #[must_use]
    pub fn rights(&self) -> String {
        let letter = |bit: u64, letter: char| if self.flags & bit != 0 { letter } else { '-' };
        let shared = if self.flags & 0x80 != 0 { 's' } else { 'p' };
        [letter(1, 'r'), letter(2, 'w'), letter(4, 'x'), shared].iter().collect()
    }

    /// May be executed.
    #[must_use]
    pub fn executable(&self) -> bool {
        self.flags & 4 != 0
    }
}

impl<'a> View<'a> {
    /// The user half of an address space, whose `mm_struct` is at `mm`.
    #[must_use]
    pub fn user_space(&self, mm: u64) -> Option<Space<'a>> {
        let pgd = self.space.u64(mm.checked_add(self.kernel.layout.memory.pgd?)?)?;
        Some(self.space.with_root(self.space.translate(pgd)?))
    }

    /// The areas of an address space, by address.
    #[must_use]
    pub fn areas(&self, mm: u64) -> Vec<Area> {
        if mm < KERNEL_HALF {
            return Vec::new();
        }
        let layout = &self.kernel.layout.memory;
        let mut places = Vec::new();
        if let Some(tree) = layout.tree {
            self.tree(mm.wrapping_add(tree), &mut places);
        } else if let Some((list, next)) = layout.list.zip(layout.area_next) {
            let mut seen = HashSet::new();
            let mut at = self.space.u64(mm.wrapping_add(list));
            while let Some(area) =
                at.filter(|at| *at >= KERNEL_HALF && places.len() < MAX_AREAS && seen.insert(*at))
            {
                places.push(area);
                at = self.space.u64(area.wrapping_add(next));
            }
        }
        let mut paths = HashMap::new();
        let mut areas: Vec<Area> =
            places.into_iter().filter_map(|at| self.area(mm, at, &mut paths)).collect();
        areas.sort_by_key(|area| area.start);
        areas.dedup_by_key(|area| area.start);
        areas
    }

    fn area(&self, mm: u64, at: u64, paths: &mut HashMap<u64, String>) -> Option<Area> {
        let layout = &self.kernel.layout.memory;
        let field = |offset: Option<u64>| self.space.u64(at.checked_add(offset?)?);
        let (start, end) = (field(layout.area_start)?, field(layout.area_end)?);
        if start >= end || end > KERNEL_HALF || start & 0xfff != 0 || end & 0xfff != 0 {
            return None;
        }
        let file = field(layout.area_file).filter(|file| *file >= KERNEL_HALF);
        let mut area = Area {
            start,
            end,
            flags: field(layout.area_flags)?,
            offset: field(layout.area_offset)?.wrapping_mul(4096),
            file: file.and_then(|file| self.file(file)),
            name: String::new(),
        };
        area.name = match file {
            Some(file) if paths.len() < MAX_FILES || paths.contains_key(&file) => {
                paths.entry(file).or_insert_with(|| self.path(file).unwrap_or_default()).clone()
            }
            Some(_) => String::new(),
            None => {
                area.offset = 0;
                self.special_mapping(at).unwrap_or_else(|| self.special(mm, start, end).to_owned())
            }
        };
        Some(area)
    }

    /// The name of what the kernel itself maps for everybody.
    fn special_mapping(&self, area: u64) -> Option<String> {
        let layout = &self.kernel.layout.memory;
        let ops = self.space.u64(area.checked_add(layout.area_ops?)?)?;
        (Some(ops) == self.kernel.symbols().address("special_mapping_vmops")).then_some(())?;
        let mapping = self.space.u64(area.checked_add(layout.area_private?)?)?;
        let name = self.space.u64(mapping.checked_add(layout.special_name?)?)?;
        self.space.text(name, 64)
    }

    /// What areas without a file are for.
    fn special(&self, mm: u64, start: u64, end: u64) -> &'static str {
        let layout = &self.kernel.layout.memory;
        let field = |offset: Option<u64>| self.space.u64(mm.checked_add(offset?)?);
        if field(layout.vdso) == Some(start) {
            return "[vdso]";
        }
        if let (Some(low), Some(high)) = (field(layout.brk_start), field(layout.brk))
            && start < high
            && end > low
        {
            return "[heap]";
        }
        if field(layout.stack).is_some_and(|at| (start..end).contains(&at)) {
            return "[stack]";
        }
        ""
    }

    fn file(&self, file: u64) -> Option<MappedFile> {
        let layout = &self.kernel.layout.memory;
        let inode = self.space.u64(file.checked_add(layout.file_inode?)?)?;
        let number = self.space.u64(inode.checked_add(layout.inode_number?)?)?;
        let super_block = self.space.u64(inode.checked_add(layout.inode_super?)?)?;
        let device = self.space.u32(super_block.checked_add(layout.super_dev?)?)?;
        // MINORBITS is 20.
        Some(MappedFile { address: file, device: (device >> 20, device & 0xf_ffff), inode: number })
    }

    /// The path of a `struct file`, from the root of its file system on across mounts.
    #[must_use]
    pub fn path(&self, file: u64) -> Option<String> {
        let layout = &self.kernel.layout.memory;
        let word = |at: u64, offset: Option<u64>| self.space.u64(at.checked_add(offset?)?);
        let mut dentry = word(file, layout.file_dentry)?;
        let mut mount = word(file, layout.file_mount)?.wrapping_sub(layout.mount_vfs?);
        let unhashed = word(dentry, layout.dentry_hash) == Some(0);
        let mut parts: Vec<String> = Vec::new();
        let mut len = 0;
        for _ in 0..MAX_PARTS {
            let root = word(mount.wrapping_add(layout.mount_vfs?), layout.mount_root);
            let parent = word(dentry, layout.dentry_parent)?;
            if Some(dentry) == root || parent == dentry {
                let above = word(mount, layout.mount_parent)?;
                if above == mount || Some(dentry) != root {
                    let mut path: String = parts.iter().rev().flat_map(|part| ["/", part]).collect();
                    if path.is_empty() {
                        path.push('/');
                    }
                    // A root is never in the hash, but it has a parent: itself.
                    if unhashed && !parts.is_empty() {
                        path += " (deleted)";
                    }
                    return Some(path);
                }
                dentry = word(mount, layout.mount_point)?;
                mount = above;
                continue;
            }
            let count = self.space.u32(dentry.checked_add(layout.dentry_name_len?)?)? as usize;
            let name = self.space.bytes(word(dentry, layout.dentry_name)?, count as u64, MAX_NAME)?;
            len += count + 1;
            if len > MAX_PATH {
                return None;
            }
            parts.push(String::from_utf8_lossy(&name).into_owned());
            dentry = parent;
        }
        None
    }

    /// The path of the program of an address space.
    #[must_use]
    pub fn program(&self, mm: u64) -> Option<String> {
        let file = self.space.u64(mm.checked_add(self.kernel.layout.memory.exe?)?)?;
        (file >= KERNEL_HALF).then(|| self.path(file)).flatten()
    }

    /// The entries of the maple tree at `tree` (Linux, include/linux/maple_tree.h).
    fn tree(&self, tree: u64, out: &mut Vec<u64>) {
        let root = self.kernel.layout.memory.tree_root.and_then(|at| self.space.u64(tree.wrapping_add(at)));
        let mut nodes = 0;
        match root {
            Some(root) if is_node(root) => self.node(root, u64::MAX, 0, &mut nodes, out),
            Some(root) if root >= KERNEL_HALF && root & 3 == 0 => out.push(root),
            _ => {}
        }
    }

    /// One node, which is for indexes up to `last`.
    fn node(&self, entry: u64, last: u64, depth: usize, nodes: &mut usize, out: &mut Vec<u64>) {
        const LEAF: u64 = 1;
        const RANGE: u64 = 2;
        const ARANGE: u64 = 3;
        let layout = &self.kernel.layout.memory;
        *nodes += 1;
        if depth > MAX_DEPTH || *nodes > MAX_NODES {
            return;
        }
        let (at, kind) = (entry & !0xff, entry >> 3 & 15);
        let (pivots, slots, count) = match kind {
            LEAF | RANGE => (layout.range_pivot, layout.range_slot, 16),
            ARANGE => (layout.arange_pivot, layout.arange_slot, 10),
            _ => return,
        };
        let Some((pivots, slots)) = pivots.zip(slots) else { return };
        for slot in 0..count {
            let pivot = if slot < count - 1 {
                self.space.u64(at.wrapping_add(pivots + 8 * slot)).unwrap_or(0)
            } else {
                last
            };
            // A pivot of 0 behind the first: this slot is the node's last.
            let end = if pivot == 0 && slot > 0 { last } else { pivot };
            let Some(value) = self.space.u64(at.wrapping_add(slots + 8 * slot)) else { return };
            if kind == LEAF {
                if value >= KERNEL_HALF && value & 3 == 0 && out.len() < MAX_AREAS {
                    out.push(value);
                }
            } else if value >= KERNEL_HALF {
                self.node(value, end, depth + 1, nodes, out);
            }
            if end >= last {
                return;
            }
        }
    }
}

/// A node of a maple tree or an xarray, not a value.
fn is_node(entry: u64) -> bool {
    entry & 3 == 2 && entry > 4096
}
