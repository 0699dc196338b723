//! The pictures of a conversation, fetched and in the order of their marks; a video becomes its frames.

use super::{Conversation, PictureRef, VideoRef};
use crate::annotation::{IMAGE_MARK, Role, Turn, VIDEO_MARK, place_marks};
use crate::error::{BadSample, Failure};
use crate::image::{Picture, Share, frame_count};
use crate::shard::RawSample;
use crate::spec::ImageSpec;

/// A conversation whose `<image>` marks are as many as its pictures.
#[derive(Debug)]
pub(crate) struct Gathered {
    pub(crate) turns: Vec<Turn>,
    pub(crate) pictures: Vec<Picture>,
}

/// Fetches what a conversation names and plans it from the headers.
///
/// # Errors
/// [`BadSample::ImageCount`], [`BadSample::VideoCount`], those of the pictures; errors of a remote store.
pub(crate) fn gather(raw: &RawSample, named: Conversation, spec: &ImageSpec) -> Result<Gathered, Failure> {
    let Conversation { mut turns, images, videos } = named;
    place_videos(&mut turns, videos.len())?;
    place_marks(&mut turns, images.len())?;
    let share = Share::OneOf(images.len());
    let (mut images, mut videos) = (images.into_iter(), videos.into_iter());
    let mut pictures = Vec::new();
    for turn in turns.iter_mut().filter(|turn| turn.role == Role::User) {
        for mark in marks(&turn.text) {
            if mark == IMAGE_MARK {
                let Some(PictureRef { name, frame }) = images.next() else { continue };
                let bytes = raw.image(&name)?;
                pictures.push(Picture::plan(name, bytes, frame, share, spec)?);
            } else if let Some(video) = videos.next() {
                let frames = open_frames(raw, video, spec)?;
                turn.text = set_out(&turn.text, frames.len());
                pictures.extend(frames);
            }
        }
    }
    Ok(Gathered { turns, pictures })
}

/// The marks in a text, in order.
fn marks(text: &str) -> Vec<&'static str> {
    let places = |mark: &'static str| text.match_indices(mark).map(move |(at, _)| (at, mark));
    let mut marks: Vec<_> = places(IMAGE_MARK).chain(places(VIDEO_MARK)).collect();
    marks.sort_unstable();
    marks.into_iter().map(|(_, mark)| mark).collect()
}

/// Makes the `<video>` marks match the number of videos, as [`place_marks`] does for images.
fn place_videos(turns: &mut [Turn], videos: usize) -> Result<(), BadSample> {
    let users = turns.iter().filter(|turn| turn.role == Role::User);
    let marks: usize = users.map(|turn| turn.text.matches(VIDEO_MARK).count()).sum();
    if marks == videos {
        return Ok(());
    }
    match turns.iter_mut().find(|turn| turn.role == Role::User) {
        Some(first) if marks == 0 => {
            first.text.insert_str(0, &format!("{VIDEO_MARK}\n").repeat(videos));
            Ok(())
        }
        _ => Err(BadSample::VideoCount { marks, videos }),
    }
}

/// Puts one line per frame in the place of the first `<video>`.
fn set_out(text: &str, frames: usize) -> String {
    let (before, after) = text.split_once(VIDEO_MARK).unwrap_or((text, ""));
    let lines: Vec<String> = (1..=frames).map(|frame| format!("Frame-{frame}: {IMAGE_MARK}")).collect();
    let end = if after.is_empty() || after.starts_with('\n') { "" } else { "\n" };
    format!("{before}{}{end}{after}", lines.join("\n"))
}

fn open_frames(raw: &RawSample, video: VideoRef, spec: &ImageSpec) -> Result<Vec<Picture>, Failure> {
    let names = match video {
        VideoRef::Frames(names) => names,
        VideoRef::Whole(name) => match raw.images_in(&name)? {
            Some(names) if names.is_empty() => {
                let detail = "the folder has no frames".to_owned();
                return Err(BadSample::BadImage { image: name, detail }.into());
            }
            Some(names) => names,
            None => {
                let bytes = raw.image(&name)?;
                let count = frame_count(&name, &bytes)?;
                let plan = |frame| Picture::plan(name.clone(), bytes.clone(), frame, Share::Frame, spec);
                return Ok(thinned(count, spec.max_frames).map(plan).collect::<Result<_, _>>()?);
            }
        },
    };
    thinned(names.len(), spec.max_frames)
        .map(|at| Ok(Picture::plan(names[at].clone(), raw.image(&names[at])?, 0, Share::Frame, spec)?))
        .collect()
}

/// At most `most` of `0..count`, evenly, the first and the last among them.
fn thinned(count: usize, most: usize) -> impl Iterator<Item = usize> {
    let kept = count.min(most);
    let gaps = kept.saturating_sub(1).max(1);
    (0..kept).map(move |at| (at * (count - 1) + gaps / 2) / gaps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_thinned_evenly() {
        let thin = |count, most| thinned(count, most).collect::<Vec<_>>();
        assert_eq!(thin(3, 8), [0, 1, 2]);
        assert_eq!(thin(10, 4), [0, 3, 6, 9]);
        assert_eq!(thin(1000, 3), [0, 500, 999]);
        assert_eq!(thin(9, 1), [0]);
        assert!(thin(0, 4).is_empty());
        for count in 1..40 {
            for most in 2..12 {
                let frames = thin(count, most);
                assert_eq!((frames[0], frames.last()), (0, Some(&(count - 1))));
                assert!(frames.windows(2).all(|pair| pair[0] < pair[1]), "{count} {most}: {frames:?}");
            }
        }
    }

    #[test]
    fn a_video_is_set_out_line_by_line() {
        assert_eq!(set_out("<video>\nQ", 2), "Frame-1: <image>\nFrame-2: <image>\nQ");
        assert_eq!(set_out("See <video> and <video>", 1), "See Frame-1: <image>\n and <video>");
        assert_eq!(marks("<video><image> <video>"), [VIDEO_MARK, IMAGE_MARK, VIDEO_MARK]);
    }
}
