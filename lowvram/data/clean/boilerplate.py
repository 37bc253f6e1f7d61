"""Knows lines of web pages that belong to no text: menus, buttons, notices of cookies; knows no file."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lowvram.data.clean.batch import Batch

# Written for this project.  Case, punctuation and blanks make no difference; numbers do.
LINES = """\
ana sayfa
anasayfa
hakkımızda
bize ulaşın
bizimle iletişime geçin
site haritası
gizlilik politikası
gizlilik ve çerez politikası
çerez politikası
çerezleri kabul et
tüm çerezleri kabul et
kabul ediyorum
kullanım koşulları
kullanım şartları
üyelik sözleşmesi
kişisel verilerin korunması
kvkk aydınlatma metni
tüm hakları saklıdır
her hakkı saklıdır
copyright tüm hakları saklıdır
giriş yap
üye girişi
üye ol
kayıt ol
hemen üye ol
şifremi unuttum
çıkış yap
devamını oku
devamı için tıklayın
daha fazla göster
daha fazlasını oku
daha fazla bilgi
haberin devamı
ilgili haberler
ilgili yazılar
benzer haberler
benzer yazılar
önceki yazı
sonraki yazı
önceki sayfa
sonraki sayfa
yorum yap
yorum yaz
yorum gönder
bir yorum bırak
bir cevap yazın
yanıtla
cevapla
paylaş
facebook ta paylaş
twitter da paylaş
whatsapp ta paylaş
arkadaşına gönder
yazdır
sepete ekle
favorilere ekle
sepete git
hemen al
bültenimize abone olun
abone ol
bizi takip edin
reklam
advertisement
yukarı çık
sayfa başına dön
bu site çerez kullanmaktadır
bu sitede çerezler kullanılmaktadır
size daha iyi hizmet sunabilmek için çerezleri kullanıyoruz
javascript etkin değil
lütfen javascript i etkinleştirin
tarayıcınız javascript desteklemiyor
e posta hesabınız yayımlanmayacak gerekli alanlar ile işaretlenmişlerdir
e posta adresiniz yayınlanmayacak gerekli alanlar ile işaretlenmişlerdir
about us
contact us
privacy policy
cookie policy
terms of use
terms and conditions
all rights reserved
log in
sign in
sign up
read more
load more
share this
leave a comment
leave a reply
previous post
next post
add to cart
subscribe to our newsletter
accept all cookies
we use cookies to improve your experience
please enable javascript
skip to content
"""


def hash_lines(extra: Iterable[str] = ()) -> NDArray[np.uint64]:
    """Return the sorted hashes of the known lines and of `extra`."""
    lines = [*LINES.splitlines(), *extra]
    return np.unique(Batch(lines).line_hashes)


def mark_lines(batch: Batch, known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Mark the lines of a batch that are known, in documents of more than one line."""
    hashes = batch.line_hashes
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    lines = np.bincount(batch.line_documents, minlength=len(batch.texts))
    marks: NDArray[np.bool_] = (known[places] == hashes) & (batch.line_words > 0)
    return marks & (lines[batch.line_documents] > 1)
