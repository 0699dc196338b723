//! What can go wrong: [`Error`] stops a run, [`BadSample`] skips one sample.

use std::path::PathBuf;

/// Result of this crate's fallible operations.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure that stops the run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value of the data specification is out of its range.
    #[error("`{field}` is {found}, expected {expected}")]
    InvalidSpec {
        /// Dotted path inside the specification.
        field: String,
        /// The value as given.
        found: String,
        /// What would be accepted.
        expected: &'static str,
    },
    /// A shard pattern is malformed.
    #[error("source `{name}`: cannot read the shard pattern `{pattern}`: {detail}")]
    Pattern {
        /// The source's name.
        name: String,
        /// The pattern as given.
        pattern: String,
        /// What the parser says.
        detail: String,
    },
    /// A shard pattern matches no file.
    #[error("source `{name}`: the shard pattern `{pattern}` matches no file (nothing at `{missing}`)")]
    NoShards {
        /// The source's name.
        name: String,
        /// The pattern as given.
        pattern: String,
        /// The expanded path that has no file behind it.
        missing: String,
    },
    /// The same shard is named twice in one source.
    #[error(
        "source `{name}`: the shard `{shard}` is named twice\n\nhint: use `weight` to read a source more often"
    )]
    DuplicateShard {
        /// The source's name.
        name: String,
        /// The shard's path.
        shard: String,
    },
    /// None of a source's shards holds a sample.
    #[error("source `{name}`: none of its {shards} shards holds a sample")]
    EmptySource {
        /// The source's name.
        name: String,
        /// How many shards it has.
        shards: usize,
    },
    /// A source's sampling weights do not belong to its shards, or are none.
    #[error(
        "source `{name}`: the sampling weights `{}` {detail}\n\nhint: write them again with `sail-data rebalance`, with the shards and the `layout` of the source", path.display()
    )]
    SamplingWeights {
        /// The source's name.
        name: String,
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be accepted.
        detail: String,
    },
    /// A file could not be opened or read.
    #[error("cannot read `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        cause: std::io::Error,
    },
    /// A path or URL that no store can be made for.
    #[error("cannot read `{location}`: {detail}")]
    BadLocation {
        /// The path or the URL, without its query.
        location: String,
        /// What is wrong with it, and what would be accepted.
        detail: String,
    },
    /// A server could not be reached, or gave no usable answer, also after the configured retries.
    #[error("cannot read `{location}` (attempt {attempts}): {detail}\n\nhint: {hint}")]
    Store {
        /// The URL, without its query.
        location: String,
        /// Requests made in a row without a byte arriving.
        attempts: usize,
        /// What went wrong with the last of them.
        detail: String,
        /// What may help.
        hint: &'static str,
    },
    /// An object is not the one that was opened.
    #[error(
        "`{location}` has changed while it was being read: {detail}\n\nhint: write new shards under new names; start the run again to read the new content"
    )]
    Changed {
        /// The URL, without its query.
        location: String,
        /// What differs.
        detail: String,
    },
    /// A shard does not fit into the cache on disk.
    #[error(
        "shard `{location}` needs {bytes} bytes, and the cache holds at most {max_bytes}\n\nhint: raise `max_bytes` of the cache, or read without one"
    )]
    CacheTooSmall {
        /// The shard.
        location: String,
        /// Its size.
        bytes: u64,
        /// The limit of the cache.
        max_bytes: u64,
    },
    /// A compressed shard grows beyond every reasonable size.
    #[error(
        "shard `{location}` decompresses to more than {limit} bytes\n\nhint: is it a damaged or a hostile file? the limit is `max_bytes` of the cache, or 64 GiB without one"
    )]
    TooLargeUnpacked {
        /// The shard.
        location: String,
        /// Where decompression stopped.
        limit: u64,
    },
    /// The compression of a shard is damaged or cut off.
    #[error(
        "shard `{location}` cannot be decompressed ({codec}): {detail}\n\nhint: the file is truncated or corrupt; copy it again or make it anew"
    )]
    BadCompression {
        /// The shard.
        location: String,
        /// The compression found.
        codec: &'static str,
        /// What the decoder says.
        detail: String,
    },
    /// A store has no object of this name.
    #[error(
        "cannot read `{location}`: there is no such object\n\nhint: check the name, the bucket and the endpoint"
    )]
    NoObject {
        /// The URL, without its query.
        location: String,
    },
    /// A shard is truncated or is not a tar archive.
    #[error("shard `{shard}` is broken at byte {offset}: {detail}")]
    BrokenShard {
        /// The shard's path.
        shard: String,
        /// Where the member that cannot be read begins.
        offset: u64,
        /// What is wrong there.
        detail: String,
    },
    /// A shard is compressed in a way that is not read.
    #[error(
        "shard `{shard}` is compressed with {codec}\n\nhint: store shards as plain `.tar`, since images are compressed already, or as `.tar.gz` or `.tar.zst`"
    )]
    CompressedShard {
        /// The shard's path.
        shard: String,
        /// The compression found.
        codec: &'static str,
    },
    /// A shard is one JSON document, so that samples cannot be addressed by their offset.
    #[error(
        "shard `{shard}` is a JSON document, in which no sample can be found by its place\n\nhint: turn it into shards with `sail-data pack`, or write one annotation a line into a `.jsonl`"
    )]
    WholeJson {
        /// The shard's path.
        shard: String,
    },
    /// Too large a share of a source's samples is bad.
    #[error(
        "source `{name}`: {skipped} of {seen} samples are bad, more than the limit of {limit}; the commonest reason is `{reason}` ({count} times)\n\nhint: does the source need another `layout`, or `images`? where samples are too long, raise `batch.tokens_per_pack`; else mend the samples named above, or raise `data.max_error_rate`"
    )]
    TooManyBad {
        /// The source's name.
        name: String,
        /// Samples looked at so far.
        seen: u64,
        /// Samples skipped so far.
        skipped: u64,
        /// `max_error_rate`.
        limit: f64,
        /// The commonest reason.
        reason: String,
        /// How often it occurred.
        count: u64,
    },
    /// A held-out source gave no sample at all.
    #[error("source `{name}`: none of its {skipped} samples can be used; the commonest reason is `{reason}`")]
    NoGoodSample {
        /// The source's name.
        name: String,
        /// Samples skipped.
        skipped: u64,
        /// The commonest reason.
        reason: String,
    },
    /// A tokenizer file cannot be used.
    #[error("tokenizer `{}`: {detail}", path.display())]
    Tokenizer {
        /// The `tokenizer.json`.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// The tokenizer lacks a token that the template or the images need.
    #[error("tokenizer `{}` has no token `{token}`, needed as {purpose}", path.display())]
    MissingToken {
        /// The `tokenizer.json`.
        path: PathBuf,
        /// The token.
        token: String,
        /// What it is needed for.
        purpose: &'static str,
    },
    /// A chat template is not there or cannot be used.
    #[error("chat template `{}`: {detail}", path.display())]
    ChatTemplate {
        /// The file that holds it.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A sample has more tokens than a pack, and the specification says that this stops the run.
    #[error(
        "source `{source_name}`: the sample `{key}` of shard `{shard}` has {tokens} tokens, more than the {limit} of a pack\n\nhint: raise `batch.tokens_per_pack`, or of a task `tokens_per_pack`; a stage may also set `data.too_long` to `drop` or `truncate_text`"
    )]
    SampleTooLong {
        /// The source's name.
        source_name: String,
        /// The shard's path.
        shard: String,
        /// The sample's key.
        key: String,
        /// Tokens of the sample.
        tokens: usize,
        /// `tokens_per_pack`.
        limit: usize,
    },
    /// Text or an image given directly (not from a shard) cannot be used.
    #[error("cannot use `{what}`")]
    Unusable {
        /// The file or the piece of text.
        what: String,
        /// Why.
        #[source]
        cause: BadSample,
    },
    /// A `preprocessor_config.json` is malformed, or asks for what is not supported.
    #[error("`{}`: `{key}` {detail}", path.display())]
    Preprocessor {
        /// The file.
        path: PathBuf,
        /// The key inside it.
        key: String,
        /// What it is, and what would be accepted.
        detail: String,
    },
    /// A saved stream state does not belong to this data specification.
    #[error("the saved data position does not fit the configured data: {detail}")]
    StateMismatch {
        /// What differs.
        detail: String,
    },
    /// A worker of the loader died; the panic itself is in the log.
    #[error("the worker that prepares stream {stream} panicked")]
    WorkerPanicked {
        /// The logical stream.
        stream: usize,
    },
    /// The worker threads could not be started.
    #[error("cannot start {threads} worker threads: {detail}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the system says.
        detail: String,
    },
    /// The loader has returned an error before and gives nothing more.
    #[error("the loader has stopped after an earlier error")]
    Stopped,
}

/// Why one sample is skipped. The run goes on; see [`BadSample::reason`] for the counted name.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BadSample {
    /// What the answer is made of is not there.
    #[error("it has no {wanted} (members: {members})")]
    NoAnnotation {
        /// What was looked for.
        wanted: &'static str,
        /// Suffixes of the members that are there.
        members: String,
    },
    /// Two members have the same name.
    #[error("the member `{name}` occurs twice")]
    DuplicateMember {
        /// The member's name.
        name: String,
    },
    /// The annotation is not JSON, or not in a known form.
    #[error("its annotation cannot be read: {detail}")]
    BadJson {
        /// What the parser says.
        detail: String,
    },
    /// The roles of the turns make no sense.
    #[error("turn {turn}: {detail}")]
    BadTurns {
        /// Index of the turn.
        turn: usize,
        /// What is wrong with it.
        detail: String,
    },
    /// No turn of the assistant has any text: nothing to learn from.
    #[error("no answer of the assistant has any text")]
    NoAnswer,
    /// The annotation names an image that is not in the sample.
    #[error("it refers to the image `{reference}`, and the sample has {members}")]
    UnknownImage {
        /// The name in the annotation.
        reference: String,
        /// The members that are there.
        members: String,
    },
    /// A layout that is about an image finds none.
    #[error("it has no image (members: {members})")]
    NoImage {
        /// Suffixes of the members that are there.
        members: String,
    },
    /// Its image was never fetched, as img2dataset notes.
    #[error("its image was not downloaded: {status}")]
    NotDownloaded {
        /// The status in its `.json`, with the message.
        status: String,
    },
    /// The annotation names a file outside the folder of images.
    #[error("`{reference}` is no path inside the folder of images")]
    BadPath {
        /// The name in the annotation.
        reference: String,
    },
    /// The annotation names a file that is not there or cannot be read.
    #[error("cannot read `{path}`: {detail}")]
    MissingFile {
        /// Where it should be.
        path: String,
        /// What the system says.
        detail: String,
    },
    /// The number of `<image>` marks is not the number of images.
    #[error("it has {marks} `<image>` marks for {images} images")]
    ImageCount {
        /// Marks in the text of the user.
        marks: usize,
        /// Images of the sample.
        images: usize,
    },
    /// The number of `<video>` marks is not the number of videos.
    #[error("it has {marks} `<video>` marks for {videos} videos")]
    VideoCount {
        /// Marks in the text of the user.
        marks: usize,
        /// Videos of the sample.
        videos: usize,
    },
    /// An image is truncated, or of an unknown format.
    #[error("image `{image}` cannot be decoded: {detail}")]
    BadImage {
        /// The image's member name.
        image: String,
        /// What the decoder says.
        detail: String,
    },
    /// An image has more pixels than allowed (a decompression bomb).
    #[error("image `{image}` has {width}x{height} pixels, more than the limit of {limit}")]
    ImageTooLarge {
        /// The image's member name.
        image: String,
        /// Width from the header, in pixels.
        width: u32,
        /// Height from the header, in pixels.
        height: u32,
        /// `max_pixels`.
        limit: u64,
    },
    /// The sample has more tokens than a pack.
    #[error("it has {tokens} tokens, more than the {limit} of a pack")]
    TooLong {
        /// Tokens of the sample.
        tokens: usize,
        /// `tokens_per_pack`.
        limit: usize,
    },
    /// The chat template refuses its turns.
    #[error("the chat template cannot write it: {detail}")]
    Template {
        /// What the template says.
        detail: String,
    },
    /// Its text cannot be tokenised, or turns into a token that only the template may write.
    #[error("its text cannot be used: {detail}")]
    Text {
        /// What is wrong.
        detail: String,
    },
}

impl BadSample {
    /// The name under which this kind is counted, in snake case.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoAnnotation { .. } => "no_annotation",
            Self::DuplicateMember { .. } => "duplicate_member",
            Self::BadJson { .. } => "bad_json",
            Self::BadTurns { .. } => "bad_turns",
            Self::NoAnswer => "no_answer",
            Self::UnknownImage { .. } => "unknown_image",
            Self::NoImage { .. } => "no_image",
            Self::NotDownloaded { .. } => "not_downloaded",
            Self::BadPath { .. } => "bad_path",
            Self::MissingFile { .. } => "missing_file",
            Self::VideoCount { .. } => "video_count",
            Self::ImageCount { .. } => "image_count",
            Self::BadImage { .. } => "bad_image",
            Self::ImageTooLarge { .. } => "image_too_large",
            Self::TooLong { .. } => "too_long",
            Self::Template { .. } => "chat_template",
            Self::Text { .. } => "bad_text",
        }
    }
}

/// Why a sample could not be read: by its own fault, or by one of the run.
#[derive(Debug)]
pub(crate) enum Failure {
    Sample(BadSample),
    Run(Error),
}

impl From<BadSample> for Failure {
    fn from(cause: BadSample) -> Self {
        Self::Sample(cause)
    }
}

impl From<Error> for Failure {
    fn from(cause: Error) -> Self {
        Self::Run(cause)
    }
}
