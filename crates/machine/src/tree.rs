//! [`Tree`]: what can be looked at, as named values.

use std::collections::BTreeMap;

use serde::Serialize;

/// A tree of named values, as a device or a vCPU tells of itself while it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Tree {
    /// Named parts.
    Node(BTreeMap<String, Tree>),
    /// A number.
    Number(u64),
    /// Yes or no.
    Flag(bool),
    /// Anything else in words.
    Text(String),
}

impl Default for Tree {
    fn default() -> Tree {
        Tree::Node(BTreeMap::new())
    }
}

impl From<u64> for Tree {
    fn from(number: u64) -> Tree {
        Tree::Number(number)
    }
}

impl From<usize> for Tree {
    fn from(number: usize) -> Tree {
        Tree::Number(number as u64)
    }
}

impl From<bool> for Tree {
    fn from(flag: bool) -> Tree {
        Tree::Flag(flag)
    }
}

impl From<&str> for Tree {
    fn from(text: &str) -> Tree {
        Tree::Text(text.to_owned())
    }
}

impl From<String> for Tree {
    fn from(text: String) -> Tree {
        Tree::Text(text)
    }
}

impl Tree {
    /// The tree of what serde says of `value`; lists become nodes with numbers for names.
    #[must_use]
    pub fn of(value: &impl Serialize) -> Tree {
        serde_json::to_value(value).map_or_else(|error| Tree::Text(error.to_string()), Tree::convert)
    }

    fn convert(value: serde_json::Value) -> Tree {
        use serde_json::Value;
        match value {
            Value::Null => Tree::Text("none".to_owned()),
            Value::Bool(flag) => Tree::Flag(flag),
            Value::Number(number) => {
                number.as_u64().map_or_else(|| Tree::Text(number.to_string()), Tree::Number)
            }
            Value::String(text) => Tree::Text(text),
            Value::Array(all) => {
                let named = all.into_iter().enumerate();
                Tree::Node(named.map(|(n, value)| (n.to_string(), Tree::convert(value))).collect())
            }
            Value::Object(all) => {
                Tree::Node(all.into_iter().map(|(name, value)| (name, Tree::convert(value))).collect())
            }
        }
    }

    /// The tree of a flat list, whose names say by slashes where a value stands. Decimal numbers and truth values
    /// are taken as such.
    #[must_use]
    pub fn from_list(list: Vec<(String, String)>) -> Tree {
        let mut tree = Tree::default();
        for (name, value) in list {
            let value = match (value.parse(), value.as_str()) {
                (Ok(number), _) => Tree::Number(number),
                (_, "true") => Tree::Flag(true),
                (_, "false") => Tree::Flag(false),
                _ => Tree::Text(value),
            };
            tree.put(&name, value);
        }
        tree
    }

    /// Puts `value` at `path`, whose parts are divided by slashes. A value that is in the way becomes the part
    /// without a name.
    pub fn put(&mut self, path: &str, value: impl Into<Tree>) {
        let mut at = self;
        for part in path.split('/') {
            if !matches!(at, Tree::Node(_)) {
                let old = std::mem::take(at);
                at.put("", old);
            }
            let Tree::Node(parts) = at else { return };
            at = parts.entry(part.to_owned()).or_default();
        }
        let old = std::mem::replace(at, value.into());
        if let (Tree::Node(parts), Tree::Node(new)) = (old, &mut *at) {
            for (name, part) in parts {
                new.entry(name).or_insert(part);
            }
        }
    }

    /// What stands at `path`; the empty path is the whole.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&Tree> {
        let mut parts = path.split('/').filter(|part| !part.is_empty());
        parts.try_fold(self, |at, part| match at {
            Tree::Node(parts) => parts.get(part),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Tree;

    #[test]
    fn lists_become_trees() {
        let list = [("a/b", "7"), ("a/c", "0x7"), ("d", "true"), ("d/e", "x"), ("a", "y")];
        let tree = Tree::from_list(list.map(|(name, value)| (name.into(), value.into())).into());
        assert_eq!(tree.get("a/b"), None, "a value went over the node of that name");
        assert_eq!(tree.get("a"), Some(&Tree::from("y")));
        assert_eq!(tree.get("/d/e/"), Some(&Tree::from("x")));
        let Some(Tree::Node(d)) = tree.get("d") else { panic!("{tree:?}") };
        assert_eq!(d[""], Tree::Flag(true));
        assert_eq!(tree.get("d/e/f"), None);
        assert_eq!(tree.get(""), Some(&tree));
        assert_eq!(serde_json::to_string(&tree).unwrap(), r#"{"a":"y","d":{"":true,"e":"x"}}"#);
    }

    #[test]
    fn what_serde_knows_becomes_a_tree() {
        let tree = Tree::of(&serde_json::json!({ "a": [1, { "b": null }], "c": -1.5 }));
        assert_eq!(tree.get("a/0"), Some(&Tree::Number(1)));
        assert_eq!(tree.get("a/1/b"), Some(&Tree::from("none")));
        assert_eq!(tree.get("c"), Some(&Tree::from("-1.5")));
    }

    #[test]
    fn nodes_grow_together() {
        let mut tree = Tree::default();
        tree.put("a/b", 1u64);
        tree.put("a", Tree::from_list(vec![("c".into(), "2".into())]));
        assert_eq!((tree.get("a/b"), tree.get("a/c")), (Some(&Tree::Number(1)), Some(&Tree::Number(2))));
    }
}
