//! From a pattern to shard locations: braces first, then globs, on disk and in object stores.

use futures_util::TryStreamExt;
use glob::MatchOptions;
use object_store::ObjectStore;
use object_store::path::Path;
use tokio::time::timeout;
use webdataset::braceexpand;

use super::Store;
use super::endpoint::Address;
use super::runtime::wait_for;
use super::trouble::{Outcome, Patience, Tries, Trouble, without_query};
use crate::error::{Error, Result};

/// As the shell matches: `*` stays inside a folder.
const AS_SHELL: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// A pattern of a source, with the names that its errors need.
#[derive(Clone, Copy)]
struct Pattern<'a> {
    source: &'a str,
    pattern: &'a str,
}

impl Pattern<'_> {
    fn malformed(self, detail: &(impl ToString + ?Sized)) -> Error {
        let (name, pattern) = (self.source.to_owned(), without_query(self.pattern));
        Error::Pattern { name, pattern, detail: detail.to_string() }
    }
}

pub(super) fn find(store: &Store, source: &str, pattern: &str) -> Result<Vec<String>> {
    let pattern = Pattern { source, pattern };
    let mut found = Vec::new();
    let named = ranged(pattern.pattern);
    if named > MOST_SHARDS {
        return Err(pattern.malformed(&format!("its ranges name {named} shards, more than {MOST_SHARDS}")));
    }
    for expanded in braceexpand(pattern.pattern).map_err(|error| pattern.malformed(&error))? {
        let before = found.len();
        match Address::parse(&expanded) {
            None => found.extend(local(pattern, &expanded)?),
            Some(address) if address.is_web() => found.push(web(pattern, &expanded)?),
            Some(address) => found.extend(objects(store, pattern, &expanded, &address)?),
        }
        if found.len() == before {
            let missing = without_query(&expanded);
            let (name, pattern) = (source.to_owned(), without_query(pattern.pattern));
            return Err(Error::NoShards { name, pattern, missing });
        }
    }
    Ok(found)
}

/// More shards than any data set has; a slip of the pen in a range takes all memory.
const MOST_SHARDS: u64 = 10_000_000;

/// How many names the ranges (`{000..999}`) of a pattern make.
fn ranged(pattern: &str) -> u64 {
    let ranges = pattern.split('{').skip(1).filter_map(|part| part.split_once('}')?.0.split_once(".."));
    let numbers = ranges.filter_map(|(from, to)| Some((from.parse::<u64>().ok()?, to.parse::<u64>().ok()?)));
    numbers.fold(1, |count: u64, (from, to)| count.saturating_mul(from.abs_diff(to).saturating_add(1)))
}

fn local(pattern: Pattern<'_>, expanded: &str) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    for path in glob::glob(expanded).map_err(|error| pattern.malformed(&error))? {
        let path = path.map_err(|error| Error::Io { path: error.path().into(), cause: error.into() })?;
        let path = path.into_os_string().into_string();
        paths.push(path.map_err(|name| pattern.malformed(&format!("{} is not UTF-8", name.display())))?);
    }
    match passed_over(expanded) {
        Some(name) => Err(pattern.malformed(&format!("it matches `{name}`, whose name is not UTF-8"))),
        None => Ok(paths),
    }
}

/// A file that the pattern means and `glob` leaves out without a word, because its name is not UTF-8.
fn passed_over(expanded: &str) -> Option<String> {
    let (folder, names) = expanded.rsplit_once('/').unwrap_or((".", expanded));
    let names = glob::Pattern::new(names).ok().filter(|_| names.contains(['*', '?', '[']))?;
    // A folder that is itself a pattern cannot be read, and is not looked into.
    let entries = std::fs::read_dir(if folder.is_empty() { "/" } else { folder }).ok()?;
    let odd = entries.flatten().map(|entry| entry.file_name()).filter(|name| name.to_str().is_none());
    odd.map(|name| name.to_string_lossy().into_owned()).find(|name| names.matches_with(name, AS_SHELL))
}

/// A web address is taken as it is: its server cannot be asked what there is.
fn web(pattern: Pattern<'_>, expanded: &str) -> Result<String> {
    // A question mark begins the query there.
    if without_query(expanded).contains(['*', '[']) {
        return Err(pattern.malformed("a web server cannot list its files; use braces, such as {000..099}"));
    }
    Ok(expanded.to_owned())
}

/// Keys of a bucket. One without a glob is taken as it is: asking for each of many shards takes long.
fn objects(
    store: &Store,
    pattern: Pattern<'_>,
    expanded: &str,
    address: &Address<'_>,
) -> Result<Vec<String>> {
    let Some(first_glob) = address.key.find(['*', '?', '[']) else { return Ok(vec![expanded.to_owned()]) };
    let matcher = glob::Pattern::new(address.key).map_err(|error| pattern.malformed(&error))?;
    let folder = address.key[..first_glob].rfind('/').map_or("", |slash| &address.key[..slash]);
    let plain = Address { scheme: address.scheme, bucket: address.bucket, key: folder };
    let (objects, prefix) = store.inner.endpoints.place(expanded, &plain)?;
    let (patience, location) = (store.inner.patience, expanded.to_owned());
    let mut keys = wait_for(async move {
        let mut tries = Tries::new(&location, patience);
        loop {
            match list(objects.as_ref(), &prefix, patience).await {
                Ok(keys) => return Ok(keys),
                Err(trouble) => tries.failed(trouble).await?,
            }
        }
    })?;
    keys.retain(|key| matcher.matches_with(key, AS_SHELL));
    keys.sort_unstable();
    Ok(keys.iter().map(|key| format!("{}://{}/{key}", address.scheme, address.bucket)).collect())
}

/// All keys below a folder. A listing is short; one that breaks off is begun anew.
async fn list(store: &dyn ObjectStore, folder: &Path, patience: Patience) -> Outcome<Vec<String>> {
    let mut listing = store.list(Some(folder));
    let mut keys = Vec::new();
    loop {
        let next = timeout(patience.silence, listing.try_next()).await;
        match next.map_err(|_| Trouble::Silent(patience.silence))?? {
            Some(object) => keys.push(object.location.to_string()),
            None => return Ok(keys),
        }
    }
}
