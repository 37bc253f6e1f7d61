"""Words, phrases and document plans of the Turkish sample text; knows no rule of grammar (data/sample.py does).

A stem may carry marks behind a slash: ~ softens (renk, rengi), ! never softens (merak, merakı), - drops its last vowel
(şehir, şehri), = doubles its last consonant (sır, sırrı), ^ takes front suffixes (saat, saati), y takes y for every
buffer (su, suyu), 3 is a compound whose (s)I is left out here (okul bahçe), n takes the pronominal n (bu, bunu),
' is a proper name; for verbs i or a is the aorist's vowel where the rule (one syllable: Ar, more: Ir) is not kept.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(word.split()) for word in text.split(","))


def _templates(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()).replace(" / ", "\n") for part in text.split("|"))


PROPER = ("name", "city", "district", "river", "sea")

NOUNS: dict[str, tuple[str, ...]] = {
    "name": _words("""Ayşe, Fatma, Elif, Zeynep, Emine, Hatice, Merve, Selin, Deniz, Derya, Ece, Defne, Gül, Gülay,
        Sevgi, Leyla, Nur, Nuray, Filiz, Aslı, Burcu, Esra, Büşra, Tuğba, Pınar, Özlem, Yasemin, Melek, Suna, Nihal/^,
        Ahmet, Mehmet, Mustafa, Ali, Hasan, Hüseyin, İbrahim, Osman, Murat, Emre, Can, Cem, Burak, Kaan, Yusuf, Ömer,
        Kerem, Ozan, Umut, Barış, Serkan, Tolga, Volkan, Onur, Orhan, Kemal/^, Sinan, Selim, Yunus, Arda, Tarık, Uğur,
        Zafer, Okan, Levent, Halil, Sibel, Nazlı, Gökhan, Koray"""),
    "city": _words("""İstanbul, Ankara, İzmir, Bursa, Antalya, Adana, Konya, Trabzon, Samsun, Erzurum, Van, Diyarbakır,
        Gaziantep, Şanlıurfa, Mardin, Kayseri, Eskişehir, Edirne, Çanakkale, Sivas, Malatya, Elazığ, Rize, Artvin,
        Sinop, Bolu, Denizli, Muğla, Aydın, Manisa, Balıkesir, Kütahya, Isparta, Mersin, Hatay, Kars, Muş, Tokat,
        Amasya, Çorum, Zonguldak, Kastamonu, Yozgat, Nevşehir, Niğde, Giresun, Ordu, Bartın, Düzce, Yalova, Uşak,
        Burdur, Siirt, Bitlis, Erzincan, Gümüşhane, Tekirdağ"""),
    "district": _words("""Üsküdar, Kadıköy, Beşiktaş, Bornova, Karşıyaka, Çankaya, Alanya, Bodrum, Fethiye, Ürgüp,
        Safranbolu, Şile, Ayvalık, Kuşada/3"""),
    "river": _words("Kızılırmak, Sakarya, Fırat, Dicle, Meriç, Yeşilırmak, Seyhan, Ceyhan, Gediz"),
    "sea": _words("Karadeniz, Akdeniz, Marmara Deniz/3, Ege Deniz/3, Van Göl/3, Tuz Göl/3"),
    "family": _words("anne, baba, abla, ağabey, dede, büyükanne, teyze, amca, dayı, hala, kuzen, kardeş, yenge"),
    "friend": _words("arkadaş, komşu, sınıf arkadaş/3, dost, oda arkadaş/3, çocukluk arkadaş/3, kuzen"),
    "person": _words("çocuk, öğrenci, kadın, adam, genç/~, yolcu, turist, ihtiyar, köylü, müşteri, kız, işçi, asker"),
    "job": _words("""öğretmen, doktor, hemşire, avukat, mühendis, aşçı, terzi, çiftçi, balıkçı, fırıncı, şoför, kasap,
        bakkal, berber, ressam, yazar, gazeteci, polis, postacı, marangoz, garson, bekçi, çoban, eczacı, müdür, memur,
        pilot, kaptan, tamirci, manav, kütüphaneci, mimar, müzisyen, bahçıvan, itfaiyeci"""),
    "fruit": _words("""elma, armut/~, üzüm, portakal, karpuz, kavun, muz, kiraz, çilek, incir, nar, kayısı, şeftali,
        erik, mandalina, limon, vişne, ayva, dut"""),
    "vegetable": _words("""domates, salatalık, biber, patlıcan, soğan, havuç, patates, ıspanak, kabak, fasulye,
        bezelye, pırasa, lahana, marul, bamya, turp, mısır, pancar"""),
    "dish": _words("""pilav, makarna, köfte, çorba, börek, kek, pasta, kurabiye, mantı, salata, helva, sütlaç, dolma,
        menemen, mercimek çorba/3, domates çorba/3, tavuk, ekmek, baklava, turşu, reçel, gözleme, elma turta/3"""),
    "snack": _words("simit/~, peynir, zeytin, bal, ceviz, fındık, fıstık, badem, dondurma, çikolata, yoğurt/~"),
    "drink": _words("çay, kahve, süt, ayran, limonata, şerbet, salep, meyve su/y3, portakal su/y3, ıhlamur"),
    "town": _words("""okul, park, pazar, market, hastane, kütüphane, müze, sinema, tiyatro, lokanta, fırın, eczane,
        istasyon, otogar, liman, cami, meydan, çarşı, postane, banka, stadyum, pastane, kale, kafe, otel, sergi,
        kitapçı, havaalan/3, çocuk park/3, hayvanat bahçe/3, tren istasyon/3, otobüs durak/3, şehir merkez/3, spor
        salon/3, balık pazar/3, belediye bina/3, kapalı çarşı, hamam, dükkân, kulüp, sokak, mahalle, terminal/^"""),
    "wild": _words("""dağ, tepe, orman, ova, vadi, yayla, ada, sahil, kıyı, çayır, köy, çiftlik, deniz kenar/3, göl
        kıyı/3, dere kenar/3, üzüm bağ/3, bahçe, tarla, nehir kıyı/3, koru, bozkır, kumsal"""),
    "water": _words("göl, nehir/-, ırmak, deniz, dere"), "hill": _words("dağ, tepe, kale, yamaç, bayır"),
    "vehicle": _words("otobüs, tren, araba, vapur, minibüs, metro, tramvay, taksi, dolmuş"),
    "pet": _words("kedi, köpek, kuş, tavşan, papağan, kanarya, kaplumbağa, at, kuzu, oğlak"),
    "animal": _words("""aslan, tilki, kurt/~, ayı, tavşan, kaplumbağa, karga, fare, kedi, köpek, eşek, deve, keçi,
        kirpi, sincap, karınca, kurbağa, serçe, leylek, baykuş, horoz, maymun, fil, geyik, inek, koyun, arı"""),
    "bird": _words("serçe, güvercin, leylek, martı, kartal, bülbül, ördek, kaz, karga, kırlangıç, baykuş, turna"),
    "room": _words("oda, mutfak, salon, banyo, balkon, oturma oda/3, yatak oda/3, çocuk oda/3, koridor, avlu, kiler"),
    "furniture": _words("""masa, sandalye, koltuk, dolap, halı, lamba, ayna, yatak, perde, kitaplık, sehpa, sandık,
        raf, çalışma masa/3, duvar saat/^3, buzdolap/3, soba, tabure, kilim"""),
    "ware": _words("""tabak, bardak, kaşık, çatal, bıçak, tencere, tava, çaydanlık, fincan, kâse, tepsi, sürahi,
        kavanoz, şişe, kap/~"""),
    "thing": _words("""anahtar, çanta, gözlük, cüzdan, şemsiye, telefon, saat/^, kalem, defter, kutu, top, oyuncak,
        bilet, harita, mektup, kâğıt/~, resim/-, sepet, valiz, fotoğraf, yüzük, fener, paket, kimlik, mendil"""),
    "clothes": _words("""gömlek, ceket, pantolon, etek, elbise, palto, ayakkabı, çorap, şapka, kazak, eldiven, atkı,
        kemer, çizme, mont, hırka, terlik, yelek"""),
    "gift": _words("çiçek, atkı, oyuncak, kolye, eldiven, kalem, tablo, vazo, kitap, kol saat/^3, bisiklet, defter"),
    "book": _words("kitap, roman, hikâye, masal, şiir, gazete, dergi, mektup, masal kitap/3, ansiklopedi, fıkra"),
    "flower": _words("gül, lale, papatya, menekşe, karanfil, sümbül, nergis, zambak, sardunya, çiçek, ayçiçek/3"),
    "tree": _words("çam, çınar, meşe, kavak, söğüt/~, ceviz ağaç/3, elma ağaç/3, kiraz ağaç/3, zeytin ağaç/3, ağaç"),
    "body": _words("el, ayak, göz, kulak, burun/-, diş, kol, bacak, parmak, omuz/-, boyun/-, diz, sırt, karın/-"),
    "lesson": _words("matematik, tarih, coğrafya, müzik, fizik, kimya, biyoloji, Türkçe, İngilizce, edebiyat"),
    "instrument": _words("saz, gitar, keman, piyano, ney, davul, flüt, kemençe, ud, bağlama"),
    "sport": _words("futbol/^, basketbol/^, voleybol/^, tenis, satranç, masa tenis/3, saklambaç"),
    "idea": _words("""hayal/^, umut/~, sabır/-, dostluk, emek, bilgi, dürüstlük, sevgi, özgürlük, cesaret, sağlık,
        arkadaşlık, dikkat/^, adalet, barış, başarı, huzur, mutluluk, zaman, güven, saygı, merak/!, vakit/-"""),
    "other": _words("""sınıf, pencere, sofra, bulaşık, saç, cadde, fatura, vitrin, ateş, yıldız, çimen, tohum, toprak,
        kum, odun, dal, köprü, uçurtma, ödev, kelime, yanlış, hazırlık, yuva, fikir/-, soru, isim/-, yol, kilometre,
        var, değil, siz, ben, sen, pınar, mağara, kapı"""),
    "month": _words("Ocak, Şubat, Mart, Nisan, Mayıs, Haziran, Temmuz, Ağustos, Eylül, Ekim, Kasım, Aralık"),
    "weekday": _words("pazartesi, salı, çarşamba, perşembe, cuma, cumartesi, pazar"),
    "season": _words("ilkbahar, yaz, sonbahar, kış"),
    "course": _words("çorba/3, yemek/3, kızartma/3, salata/3, dolma/3, kavurma/3"),
    "coach": _words("otobüs, tren, minibüs, yolcu otobüs/3, hızlı tren, gece tren/3, gece otobüs/3, uçak"),
    "ship": _words("vapur, feribot, tekne, gemi, yelkenli, balıkçı tekne/3"),
    "cover": _words("şemsiye, eldiven, atkı, palto, şapka, bere, mont, çizme, yağmurluk, hırka, kaban"),
    "shirt": _words("gömlek, pantolon, etek, elbise, ceket, önlük, yelek"),
    "box": _words("dolap, sandık, çekmece, kutu, sepet, çanta, valiz, torba"),
    "surface": _words("masa, sandalye, koltuk, sehpa, raf, yatak, tabure, dolap, çalışma masa/3, kanepe"),
    "building": _words("""okul, hastane, kütüphane, müze, sinema, tiyatro, otel, cami, postane, banka, hamam, stadyum,
        fabrika, lokanta, konak"""),
    "monthly": _words("ocak, şubat, mart, nisan, mayıs, haziran, temmuz, ağustos, eylül, ekim, kasım, aralık"),
    "pot": _words("patates, patlıcan, biber, kabak, havuç, domates, soğan, pırasa, turp"),
    "spread": _words("peynir, zeytin, bal, reçel, tereyağ/3, yumurta, yoğurt/~, helva, tahin"),
    "unit": _words("yemek kaşığı, çay kaşığı, tatlı kaşığı, avuç"),
    "staple": _words("""un, tuz, şeker, tereyağ/3, zeytinyağ/3, pirinç, bulgur, nane, pul biber, kekik, sirke, limon
        su/y3"""),
    "pronoun": _words("bu/n, şu/n, o/n, biri/n, kendi/n, kim, herkes, kimse, birbiri/n, hepsi/n"),
}
ADJECTIVES: dict[str, tuple[str, ...]] = {
    "colour": _words("kırmızı, mavi, yeşil, sarı, siyah, beyaz, mor, pembe, turuncu, gri, lacivert, kahverengi"),
    "gradable": _words("ağır, hafif, pahalı, ucuz, büyük, küçük, güzel, eski, yeni, sağlam, değerli, kullanışlı, şık"),
    "ripe": _words("taze, olgun, tatlı, sulu, güzel kokulu, lezzetli, ucuz"),
    "stormy": _words("rüzgârlı, fırtınalı, sisli, çok soğuk, karlı"),
    "summery": _words("sıcak, kurak, serin, ılık, bunaltıcı, nemli, güneşli"),
    "wintry": _words("soğuk, karlı, yağmurlu, çok soğuk, sert, ılık"),
    "nostalgic": _words("mutlu, hüzünlü, gururlu, duygulu, sevinçli, üzgün, huzurlu"),
    "weary": _words("yorgun, hasta, uykulu, üzgün, meşgul/^, aç, bitkin, halsiz"),
    "kindly": _words("""sevecen, hoşgörülü, güvenilir, zeki, çalışkan, neşeli, sessiz, akıllı, cesur, nazik, sabırlı,
        dürüst, cömert, güler yüzlü, becerikli, meraklı, yardımsever, kibar, güçlü, şakacı, konuşkan, titiz"""),
    "plain": _words("""yeni, eski, büyük, küçük, kırmızı, mavi, yeşil, sarı, siyah, beyaz, mor, pembe, renkli, ağır,
        hafif, pahalı, ucuz, yuvarlak, temiz, güzel, kocaman, küçücük, değerli, ilginç, sağlam, garip, turuncu"""),
    "scenic": _words("""kalabalık, sakin, güzel, büyük, küçük, tarihi, şirin, yeşil, canlı, serin, gürültülü, temiz,
        bakımlı, ıssız, geniş, ünlü, huzurlu, renkli, uzak"""),
    "tasty": _words("taze, lezzetli, sıcak, nefis, bol baharatlı, güzel kokulu, hafif, doyurucu, ev yapımı"),
    "weathery": _words("""güneşli, yağmurlu, bulutlu, sıcak, soğuk, rüzgârlı, sisli, karlı, açık, kapalı, serin, ılık,
        nemli, fırtınalı, buz gibi, puslu"""),
    "moody": _words("""yorgun, mutlu, üzgün, heyecanlı, şaşkın, meşgul/^, hasta, rahat, huzurlu, uykulu, kızgın,
        telaşlı, sevinçli, endişeli, gururlu, aç, umutlu, pişman"""),
}
VERBS = _words("""git/~, et/~, al/i, bul/i, dur/i, gör/i, kal/i, ol/i, var/i, ver/i, tat/~, seyret/~a, kaybet/~a,
    hisset/~a, affet/~a, ye, de, iç, pişir, doğra, yıka, hazırla, temizle, süpür, yerleştir, ütüle, as, aç, sula,
    besle, kur, topla, dinle, izle, oku, ara, yaz, yap, onar, taşı, uyu, otur, bak, bitir, bit, kalk, yat, giy, tara,
    fırçala, buluş, uğra, dön, bin, in, bekle, konuş, sor, gez, ısmarla, yürü, geç, rastla, öde, çek, götür, tırman,
    yüz, tut, yak, dinlen, dik, sev, uzan, kork, ek, kaz, kes, gir, çık, at, çalış, ezberle, söyle, hazırlan, kazan,
    iste, çiz, oyna, katıl, anlat, öğren, öğret, düzelt, anla, unut, çöz, kaldır, güven, tartış, dile, araştır, başla,
    düşün, sevin, gülümse, hatırla, inan, hoşlan, vazgeç, kız, şaşır, üzül, yaklaş, ayrıl, gül, koş, dök, gönder,
    getir, sakla, yaşa, tanı, tanış, yağ, kaç, dal, göster, düzenle, çal, uçur, ekle, karıştır, kızart, kaynat, soğut,
    dinlendir, serp, duy, saklan, seç, özle, alış, koy, geçir, görün, paylaş, sür""")

# Verb phrases by setting: what stands before the verb, a bar, the verb.  {x+my} belongs to the phrase's subject.
PHRASES: dict[str, tuple[str, ...]] = {
    "home": _templates("""{dish}>pişir | {vegetable+pl+acc} ince ince>doğra | {fruit+pl+acc}>yıka | {drink}>hazırla |
        {drink}>iç | {tasty} {dish} ile {snack}>ye | {room+acc}>temizle | {room+acc}>süpür | {ware+pl+acc}
        dolaba>yerleştir | {shirt+my+acc}>ütüle | yıkanan {shirt+pl+acc} ipe>as | {=pencere+pl+acc}>aç | saksıdaki
        {flower+pl+acc}>sula | {pet+my+acc}>besle | {=sofra+acc}>kur | {=sofra+acc}>topla | {=bulaşık+pl+acc}>yıka |
        radyo>dinle | televizyonda {plain} bir film>izle | {book}>oku | {family+my+dat}>yardım et |
        {family+my+ins}>sohbet et | {friend+my+acc} telefonla>ara | {family+my+dat} uzun bir mektup>yaz | {plain} bir
        resim>yap | bozulan {surface+acc}>onar | {furniture+acc} {room+dat}>taşı | kaybolan {thing+my+acc}>ara |
        {thing+my+acc} {surface+gen} üstünde>bul | {surface+gen} yanında>otur | {=pencere+abl} dışarı>bak | {plain}
        {clothes+my+acc}>giy | {=saç+my+acc}>tara | {=diş+pl+my+acc}>fırçala | {instrument}>çal | {room+loc}
        {family+my+acc}>bekle | {thing+acc} {box+gen} içine>sakla | {drink+acc} fincana>dök | {family+my+ins} eski
        {=fotoğraf+pl+dat}>bak | {spread+acc} sıcak {=ekmek+ins}>ye | {friend+my+dat} {dish}>götür |
        {=çekmece+pl+acc}>düzenle | {family+my+gen} yaptığı {dish+acc}>tat"""),
    "town": _templates("""{town+dat}>git | {town+loc} {friend+my+ins}>buluş | {town+dat}>uğra | {vehicle+dat}>bin |
        {vehicle+abl}>in | {vehicle+acc}>bekle | {=pazar+abl} {num} kilo {fruit}>al | çarşıdan {plain} bir {clothes}>al
        | {town+gen} önünde>dur | {job+ins}>konuş | {job+dat} bir soru>sor | {job+dat}>teşekkür et | {=müze+acc}>gez |
        {friend+my+dat} {drink}>ısmarla | kalabalık {=cadde+loc}>yürü | {=yol+gen} karşısına>geç |
        {friend+my+dat}>rastla | {town+loc} uzun süre>bekle | {friend+my+acc} {town+dat}>davet et | {friend+my+dat} bir
        {gift}>hediye et | {=fatura+pl+acc}>öde | {=banka+abl} para>çek | {=mektup+acc} postaneye>götür | {vehicle+ins}
        {town+dat}>git | {=kütüphane+abl} bir {book}>al | {=turist+dat} yol>göster | {building+gen} yolunu>öğren |
        {vehicle+loc} yer>bul | {=sinema+loc} film>izle | {town+abl} eve>dön | {=park+loc} biraz>dinlen |
        {district+dat}>git | {=vitrin+pl+dat}>bak | {=doktor+dat}>görün | {=sokak+loc} {pet+acc}>sev | {=istasyon+abl}
        {num} bilet>al | {town+loc} {family+my+ins} fotoğraf>çek | {thing+acc} {job+dat}>ver | {=meydan+loc}
        {person+ins}>tanış | {job+abl} yardım>iste | {building+gen} kapısını>aç | {=lokanta+loc} {dish}>ye"""),
    "nature": _templates("""{hill+dat}>tırman | {water+loc}>yüz | {water+loc} balık>tut | {=ateş+acc}>yak | {wild+loc}
        çadır>kur | {wild+loc} {flower}>topla | {tree+gen} gölgesinde>dinlen | bahçeye bir {tree}>dik |
        {bird+pl+acc}>izle | {pet+acc}>sev | {bird+pl+dat} yem>ver | {wild+gen} fotoğrafını>çek | {wild+loc}>yürü |
        {=yıldız+pl+acc}>seyret | {=çimen+pl+gen} üzerine>uzan | {animal+abl}>kork | {=pınar+abl} su>iç |
        {=tohum+pl+acc} toprağa>ek | {=toprak+acc}>kaz | {vegetable+pl+acc}>sula | kuru {=dal+pl+acc}>kes |
        {=odun+pl+acc} eve>taşı | {=mağara+dat}>gir | {=mağara+abl}>çık | {=kuş+gen} sesini>dinle | eski bir
        {=köprü+abl}>geç | {water+dat} küçük bir taş>at | {=kum+abl} kale>yap | {plain} bir {=uçurtma}>uçur |
        {animal+acc} uzaktan>gör | {wild+dat} {=bisiklet+ins}>git | {tree+gen} altında {book}>oku |
        {fruit+pl+acc}>topla | {wild+abl} eve>dön | {=çoban+ins}>konuş | {wild+loc} {family+my+ins}>gez | {animal+gen}
        peşinden>koş | {water+gen} kenarında>otur | {friend+my+dat} {bird+pl+acc}>göster"""),
    "school": _templates("""{lesson} dersine>gir | {lesson+dat}>çalış | {=ödev+my+acc}>yap | {book+acc}>bitir |
        {=öğretmen+acc}>dinle | {lesson} sınavına>hazırlan | bir şiir>ezberle | koroda şarkı>söyle | {friend+my+dat}
        {thing+my+acc}>ver | {friend+my+abl} {thing+acc}>iste | deftere bir harita>çiz | bahçede {sport}>oyna | {sport}
        takımına>katıl | {=fikir+my+acc}>anlat | yeni {=kelime+pl}>öğren | {friend+my+dat} {lesson}>öğret | sınıfa bir
        {book}>anlat | {=yanlış+pl+my+acc}>düzelt | {=soru+acc}>anla | zor {=soru+pl+acc}>çöz | {=öğretmen+dat} bir
        soru>sor | {=el+my+acc}>kaldır | {friend+my+dat}>güven | {friend+my+ins}>tartış | {friend+my+abl} özür>dile |
        {sport} yarışmasını>kazan | {lesson} konusunu>araştır | {instrument}>çal | tahtaya {=isim+my+acc}>yaz |
        {lesson} kitabını>oku | {friend+my+ins} {=yemek+my+acc}>paylaş | {=sınıf+acc}>süpür | {lesson}
        notlarını>düzenle | {book+gen} son sayfasını>oku | {=müdür+ins}>konuş | {friend+my+gen} sırasına>otur |
        kütüphanede {book}>ara | {lesson} dersinden>hoşlan"""),
    "fable": _templates("""{=kış+dat} {=hazırlık}>yap | {=ağaç+gen} dibine {=yuva}>yap | {water+abl} su>iç |
        {wild+loc}>gez | derin bir uykuya>dal | {fruit}>topla | {animal+ins}>konuş | {animal+dat}>gül | {animal+gen}
        evine>git | {animal+abl}>kaç | {tree+gen} altına>saklan | {animal+acc} yemeğe>davet et | {animal+dat}>inan |
        {animal+dat}>kız | yüksek bir {hill+dat}>tırman | {animal+abl} yardım>iste | {animal+ins} yemeğini>paylaş |
        gece gündüz>çalış | {fruit+pl+acc}>sakla | {wild+loc} {fruit}>ara | {animal+gen} sesini>dinle | {animal+dat}
        bir öğüt>ver | {=nehir+acc}>geç | {animal+acc}>affet | {animal+ins}>tanış"""),
}

# Sentence templates by pool.  {head+tag+...}: a head is a word class, =noun, *verb, vp (a phrase of the setting), a
# pool, or a maker of numbers.  / is a new line.  T is the document's tense and person, T3 its tense
# in the third person, P its person, R a recipe's verb, O its object.
POOLS: dict[str, tuple[str, ...]] = {
    "trip_open": _templates("""{name1}, {when} {city1+abl} {city2+dat} {coach1+ins} {*git+T3}. | {name1} ile
        {family+3s}, {when} {coach1+ins} {city1+abl} {city2+dat} {*git+T3}. | {when} {name1} {city2+dat} gitmek için
        {coach1+dat} {*bin+T3}."""),
    "memory_open": _templates("""{city1+loc} okuduğum ilkokulda öğretmenimiz {name1}, sıra arkadaşım {name2+were}. |
        {year+loc} {city1+loc} okula başladığımda öğretmenim {name1}, en iyi arkadaşım {name2+were}. | {name1}
        öğretmenimiz {kindly} bir insandı, {name2} ise sıra arkadaşımdı. | Ortaokulda {name1} bize {lesson} öğretirdi;
        {name2+ins} aynı sınıftaydık."""),
    "then": _templates("""sonra | daha sonra | öğleden sonra | akşama doğru | bir süre sonra | öğle vakti | {clock} |
        kısa bir aradan sonra | yemekten sonra | güneş batarken | biraz sonra | ardından | {num} saat sonra"""),
    "when_past": _templates("""dün | geçen {weekday} günü | {num} gün önce | geçen {season} | geçen hafta sonu | bu
        sabah | {digits} {month} günü | {num} hafta önce | {monthly} ayında | {monthly} ayının başında"""),
    "when_prog": _templates("bugün | bu hafta | şu anda | bu sabah | {monthly} ayından beri | bugünlerde"),
    "when_aor": _templates("""her {weekday} | her sabah {clock} | hafta sonları | genellikle | bazen | her {season} |
        her gün {clock} | {weekday} günleri | yılda {num} kez | tatil günlerinde | çoğu zaman"""),
    "when_hab": _templates("""o yıllarda | küçükken | her {season} | hafta sonları | her {weekday} günü | {age}
        yaşındayken | okul tatilinde | o zamanlar | eskiden"""),
    "when_fut": _templates("""yarın | yarın {clock} | gelecek {weekday} günü | gelecek hafta sonu | {digits} {month}
        günü | {num} gün sonra | önümüzdeki {season} | {monthly} ayında | {monthly} ayının sonunda | bu akşam"""),
    "start": _templates("""{when} {S} {vp+T}. | {when} {S} {vp+ip} {vp+T}. | {S} {when} {friend+my+ins} birlikte
        {vp+T}. | {when} hava {weathery+be3}; {S} {vp+T}. | {when} {S} erkenden {*kalk+ip} {vp+T}. | {S}, {when}
        {family+my+ins} {vp+T}. | {when} {family+my}, {vp+dik+my+acc} {*öğren+T3}. | {when} {S} çok {moody+be}."""),
    "deed": _templates("""{then} {vp+T}. | {S} {then} {vp+T}. | {vp+ip} {vp+T}. | {vp+dik+abl} sonra {vp+T}. |
        {vp+madan} önce {vp+T}. | {vp+ince} biraz {*dinlen+T}. | Hem {vp+T} hem de {vp+T}. | {vp+ma+dat} {*başla+T}. |
        {vp+ma+acc} {*unut+not+T}. | {vp+arak} güzel vakit {*geçir+T}. | {vp+mak} {*iste+T} ama vakit {*bul+cannot+T}.
        | {vp+dik+my+dat} çok {*sevin+T}. | {weary+be} ama yine de {vp+T}. | {vp+not+T}, çünkü çok {weary+be}. | Hava
        {weathery+be3}, bu yüzden {vp+not+T}. | {vp+dikca} {=kendi+my+acc} daha iyi {*hisset+T}. | {*dinlen+mak} yerine
        {vp+T}. | {vp+mak} hiç kolay {=değil+be3}. | {vp+mak} için {num} saat {*bekle+T}. | {vp+mus} gibi {*gülümse+T}.
        | {vp+mak+abl} {*vazgeç+not+T}. | {adverb} {vp+T}. | {vp+ip} {vp+ma+acc} çok {*sev+T}. | {vp+ma+my+gen} ne
        kadar önemli olduğunu {*anla+T}. | {vp+ali} {num} saat {*ol+T3}. | Ne yazık ki {vp+cannot+T}. | {adverb}
        {vp+abil+T}. | Artık {vp+mak+abl} {*kork+not+T}. | {weekday} akşamı ne {vp+T} ne de {vp+T}. | {then} yağmur
        {*yağ+ma+dat} {*başla+T3}. | {vp+ken} yağmur {*yağ+ma+dat} {*başla+T3}. | {vp+ma+dat} çabuk {*alış+T}. |
        {vp+dik+my+acc} hep {*hatırla+T}. | {vp+cannot+dik+my+dat} {*üzül+T}. | {num} kez {vp+T}."""),
    "pair": _templates("""{when} {name1} ile {name2} {vp+T}. | {name1} ile {name2}, {when} {family+my+ins} {vp+T}. |
        {name1} ile {name2} {when} çok {moody+be}."""),
    "act": _templates("""{vp+ken} {family+my+acc} {*düşün+T}. | {name+gen} {vp3+dik+3s+dat} {*şaşır+T}. |
        {friend+my+abl} {*ayrıl+dik+my+dat} {*üzül+T}. | {=kapı+dat} {*yaklaş+ince} {family+my+acc} {*tanı+T}. |
        {family+my+acc} çok {*özle+T}. | {friend+my+ins} birlikte {vp+T}. | {then} {family+my} {vp3+T3}, {too} {vp+T}.
        | {family+my}, {vp+dik+my+acc} {*gör+T3} ve {*gülümse+T3}. | {friend+my+dat} {vp+dik+my+acc} {*anlat+T}. |
        {vp3+an} {person+pl+acc} uzun uzun {*izle+T}. | {vp3+an} {job+dat} selam {*ver+T}. | {name+gen} {city+abl}
        {*getir+dik+3s} {gift} çok {gradable+be3}. | {name+dat} {city+abl} bir {gift} {*gönder+T}. | {then} {job} olan
        {family+my+dat} {*rastla+T}. | {name}, {vp+acak+my+acc} {*duy+T3}. | {S}, {friend+my+dat} {plain} bir {gift}
        {*al+T}. | {family+my+gen} {*ver+dik+3s} {plain} {thing+acc} {num} gün {*sakla+T}. | {thing+my} {vehicle+loc}
        {*kal+T3}. | {thing+my+acc} {vehicle+loc} {*unut+T}. | {wild+loc} {=yol+my+acc} {*kaybet+ince} {job+dat}
        {*sor+T}. | {person+gen} elindeki {thing}, {family+my+gen} {thing+3s+abl} daha {gradable+be3}. |
        {friend+my+gen} {city+loc} {*yaşa+an} {family+3s+da} {vp3+T3}. | {body+my} ağrıdığı için {vp+cannot+T}. |
        {family+my+dat} {vp3+mak+loc} yardım {*et+T}. | {name+gen} {vp3+dik+3s+dat} {*inan+not+T}. | {room+loc}
        {colour} bir {furniture} {=var+be3}. | {family+my+gen} {colour} {clothes+3s} çok {gradable+be3}. | {family+my}
        {city+abl} {*dön+ince} {vp+T}. | Masadaki {ware+pl} {family+my+gen} {*seç+dik+3p} kadar {gradable}
        {=değil+be3}."""),
    "adverb": _templates("""çabucak | yavaş yavaş | sessizce | sevinçle | dikkatle | yeniden | ilk kez | büyük bir
        merakla | sabırla | hemen | isteyerek | aceleyle | kimseye söylemeden | neşeyle | {num} kez"""),
    "talk": _templates("""{family+my} “{vp2+past+P+q}?” diye {*sor+T3}. | {name}, “Haydi, birlikte {vp4+let1p}!”
        {*de+T3}. | “{when_fut} {vp1+fut+P},” diye {*düşün+T}. | “{vp2+cond+P} ben de {vp1+aor+P},” {*de+T3} {name}. |
        {friend+my}, {vp3+dik+3s+acc} {*söyle+T3}. | “Benimle birlikte {vp2+aor+P+q}?” diye {*sor+T3} {family+my}. |
        {name} gülerek “{vp+madan} olmaz!” {*de+T3}. | {family+my}, “{vp2+imp2s}, sonra da {vp2+imp2s},” {*de+T3}. |
        “Neden {vp2+not+past+P}?” diye {*sor+T3} {friend+my}. | “Şimdi {vp1+prog+P},” {*de+T3} {name}. | “Sen de
        {vp2+abil+aor+P+q}?” diye {*merak et+T}. | “{colour} {thing+1s} {=sen+loc+q}?” diye {*sor+T3} {friend+my}. |
        {name+gen} {vp3+mak} {*iste+dik+3s+acc} {*duy+T}. | “Keşke {vp1+sa+P},” diye {*düşün+T}. | “Yarın
        {vp4+prog+P+q}, yoksa {vp4+prog+P+q}?” diye {*sor+T3} {name}. | “Siz {when_past} {vp5+past+P+q}?” {*de+T3}
        {job}. | {name}, “Bence {city}, {city+abl} daha {scenic},” {*de+T3}. | “Hayır, {vp1+not+past+P},” diye cevap
        {*ver+T3} {name}."""),
    "close": _templates("""{moody} bir hâlde eve {*dön+T}. | Böylece {weekday} günü de {*bit+T3}. | {clock} {*yat+ip}
        hemen {*uyu+T}. | Akşam {family+my+dat} {vp+dik+my+acc} {*anlat+T}. | {then} {=herkes} evine {*dön+T3}. | O
        günü {family+my+dat} sık sık {*anlat+T}. | Eve dönünce {family+my+dat} {drink} {*hazırla+T}. | {vp+dik+my+dat}
        hiç pişman {*ol+not+T}. | {family+my+da} çok {moody+be3}. | Gece olunca {=yıldız+pl+dat} {*bak+ip} {city+acc}
        {*düşün+T}. | {vp+ma+my+dat} {family+my} çok {*sevin+T3}."""),
    "hero": _templates("""{name1}, {city1+loc} yaşayan {kindly} bir {job+is}. | {name1} {age} yaşında {kindly} bir
        {=öğrenci+is}. | {name1}, {city+abl} {city1+dat} taşınan {kindly} bir {job+gen} {=çocuk+3s+is}. | {name1+gen}
        babası {district+loc} {job+is}. | {name1+gen} {city1+loc} {adjective} bir evi {=var+is}. | {name1} {kindly},
        {family+3s} ise {kindly} {=biri+is}."""),
    "adjective": _templates("{colour} | {scenic} | {num} odalı | bahçeli | {tree+pl+ins} çevrili | {plain} kapılı"),
    "trip": _templates("""{coach1} {clock} {city1+abl} {*kalk+T3}. | Yol {num} saat {*sür+T3}. | {city2+dat}
        {*var+ince} önce {town+acc} {*gez+T}. | {city2+loc} {num} gün {*kal+T}. | {city2+gen} {dish+3s} çok
        {tasty+be3}. | {city1+ins} {city2} arası {hundreds} {=kilometre+be3}. | {river+gen} kıyısında {*yürü+T}. |
        {sea+gen} kıyısında {num} saat {*dinlen+T}. | {city2}, {city1+abl} daha {scenic+be3}. | Otelin
        {=pencere+3s+abl} {wild} {*görün+T3}. | {city2+li} bir {job}, {=o+dat} şehrin en {scenic} {town+3s+acc}
        {*göster+T3}. | {coach1+dat} {*bin+madan} önce {num} bilet {*al+T}. | {city2+loc} {*yaşa+an} {family+my+dat}
        {*uğra+T}. | {river+acc} geçen eski köprüden {city2+dat} {*gir+T}. | {city2+loc} {plain} bir {gift} alıp
        {family+my+dat} {*götür+T}."""),
    "letter_open": _templates("Sevgili {name1}, | Canım {family+1s}, | Değerli arkadaşım {name1},"),
    "letter": _templates("""Mektubunu {when_past} aldım ve çok sevindim. | Ben {city1+loc}, {town+dat} yakın bir evde
        oturuyorum. | {family+2s} nasıl? {=o+dat} selam söyle. | {=sen+acc} ve {city2+acc} çok özledim. | Bana
        {city2+loc} neler yaptığını anlatır mısın? | {when_fut} {city2+dat} geleceğim. | {when_fut} {vp4+let1p+q}? |
        {vp1+dik+1s+acc} biliyor musun? | Gönderdiğin {gift} çok {gradable}, {=sen+dat} teşekkür ederim. |
        {vp2+dik+2s+acc} duyunca çok şaşırdım. | Buraya gelirsen {=sen+ins} {vp4+aor+P}. | Burada havalar {weathery},
        orada nasıl? | {vp1+prog+P}, ama {=sen+siz} olmuyor. | {family+1s}, {=sen+gen} {vp2+ma+2s+acc} istiyor. |
        {thing+2s} {=ben+loc}, {when_fut} getireceğim."""),
    "letter_close": _templates("""Sevgiler, / {name} | Selamlar, / {name} | Çok özleyen {friend+2s}, / {name} |
        {city+abl} sevgilerle, / {name} | Gözlerinden öperim. / {name}"""),
    "shop": _templates("""– {greeting}, {num} kilo {fruit1} istiyorum. / – Çok {ripe} {fruit1+pl+1p} var, {price+dat}
        veririm. | – Bu {clothes} kaç lira? / – {price}. İsterseniz {plain} olanı {price+dat} vereyim. | – {snack+2p}
        taze mi? / – Elbette, {when_past} geldi. | – {vegetable+gen} kilosu ne kadar? / – {price}, ama {=siz+dat} biraz
        indirim yaparız. | – {plain} bir {thing} arıyorum. / – {surface+gen} üstündekilere bakın. | – Şu {plain}
        {gift+acc} görebilir miyim? / – Tabii, buyurun. | – {drink} içer misiniz? / – {thanks}, {when_past} içtim. | –
        {clothes+gen} {colour} rengi yok mu? / – Maalesef, {weekday} günü gelecek. | – Bunlar {city+abl+q} geliyor? / –
        Hayır, {city+abl} getiriyoruz. | – Borcum ne kadar? / – Hepsi {price1}. / – Buyurun, {price1}. | –
        {family+1s+dat} bir {gift} almak istiyorum. / – {plain} bir {gift} beğenir mi? / – Bence {gift+acc} daha çok
        beğenir. | – {gift+acc} paketler misiniz? / – Elbette, {family1+2p+dat+q} alıyorsunuz? / – Evet,
        {family1+1s+dat}. | – Yarın açık mısınız? / – Evet, {clock} geliriz."""),
    "greeting": _templates("İyi günler | Merhaba | Kolay gelsin | Günaydın | Hayırlı işler | İyi akşamlar"),
    "farewell": _templates("Teşekkür ederim | Kolay gelsin | Hayırlı işler | Sağ olun | İyi günler"),
    "thanks": _templates("Teşekkür ederim | Sağ olun | Yok, teşekkürler | Çok naziksiniz"),
    "shop_open": _templates("""{name1} {when_past} {district+loc} bir dükkâna girdi. | {weekday} günü {name1},
        {family+3s+ins} {town+dat} uğradı. | {name1} {family+3s+dat} bir {gift} almak istiyordu."""),
    "shop_close": _templates("""{name1} parayı ödeyip {town+dat} gitti. | “{farewell},” diyerek {price} ödedi ve çıktı.
        | {name1} eve {num} paketle döndü."""),
    "town_open": _templates("""{city1} {scenic} ve {scenic} bir şehirdir. | {city1}, {city+abl} daha {scenic} bir
        şehirdir. | {city1} denince akla {scenic} {town+pl} gelir."""),
    "town_text": _templates("""Şehrin ortasında {scenic} bir {building} vardır. | {city1+loc} yazlar {summery}, kışlar
        {wintry} geçer. | {building+gen} karşısında {num} {building} bulunur. | {city1+gen} {dish+3s} ve {fruit+3s}
        ünlüdür. | Nüfusu {year+loc} {digits} bin kişiydi. | Şehre {coach+ins} ya da {coach+ins} ulaşılır. |
        {city1+li+pl} {weekday} günleri {town+dat} gider. | {town}, {town+abl} daha {scenic}, {town+abl} daha
        {scenic+dir}. | {year+loc} yapılan {building}, bugün {building} olarak kullanılıyor. | Eskiden burada {wild}
        varmış, şimdi {building} var. | En {scenic} yeri {town+dir}. | Meydandan {wild+dat} giden yol {tree+pl+ins}
        doludur. | {monthly} ayında {fruit} şenliği yapılır. | {city1+dat} gelen herkes {town+acc} görmek ister. |
        Turistlerin çoğu {city+abl} ve {city+abl} gelir. | Sokaklarında {flower+pl} açar, {bird+pl} öter. | Gençler
        {sport} oynar, yaşlılar {drink} içer."""),
    "recipe_open": _templates("""{pot1} {course} için {num} {pot1}, {few} {unit} {staple} ve {few} {unit} {staple}
        gerekir. | {num} kişilik {pot1} {course}: {num} {pot1}, {few} {unit} {staple}, biraz {staple}. |
        {family+1s+gen} {pot1} {course+acc} yapmak kolaydır; {num} {pot1} ile biraz {staple} yeter."""),
    "recipe": _templates("""Önce {pot1+pl+O} {*yıka+R}. | {pot1+pl+O} {cut} {*doğra+R}. | Tencereye {few} {unit}
        {staple} {*koy+R}. | {vegetable+O} ve {vegetable+O} {*ekle+R}. | Üzerine {few} bardak su {*dök+R}. | Kısık
        ateşte {digits} dakika {*pişir+R}. | Su kaynayınca {staple+O} {*ekle+R}. | {digits} dakika kadar {*karıştır+R}.
        | Bir kaşıkla {*karıştır+arak} {*soğut+R}. | {*pişir+dik+abl} sonra üzerine {staple} {*serp+R}. |
        {vegetable+pl} yumuşayana kadar {*kaynat+R}. | Ayrı bir tavada {vegetable+pl+O} hafifçe {*kızart+R}. | Ocaktan
        alıp {digits} dakika {*dinlendir+R}."""),
    "cut": _templates("ince ince | küp küp | halka halka | iri iri | küçük küçük"),
    "recipe_close": _templates("""{snack+ins} birlikte sıcak olarak yenir. | Yanında {drink} içilir. | {tasty}
        {dish+ins} birlikte afiyetle yenir. | Bu yemek {num} kişiye yeter."""),
    "weather_open": _templates("""{digits} {month} {weekday} günü için hava tahmini. | Yarın {city1+loc} hava
        {weathery} olacak. | {weekday} gününden itibaren havalar ısınacak. | {city1} ve çevresinde {falling}
        bekleniyor."""),
    "weather": _templates("""{city} ile {city+loc} {falling} bekleniyor. | {city+loc} en yüksek sıcaklık {digits}
        derece olacak. | Rüzgâr {wind} saatte {digits} kilometre hızla esecek. | {city+gen} {wild+pl+3s+loc} {falling}
        görülecek. | {sea+loc} dalgalar {num} metreye ulaşacak. | {city+loc} hava {city+dat} göre daha {summery}
        olacak. | {clock} {falling} başlayacak, {weekday} sabahına kadar sürecek. | {weekday} günü {city+loc} yağan kar
        {num} köyün yolunu kapattı. | Uzmanlar, “{cover+2p+acc} almayı unutmayın,” diyor. | {city+abl} kalkan
        {coach+pl} {falling} yüzünden {num} saat gecikti. | Hava {stormy} olursa {ship+pl} çalışmayacak. | {weekday}
        günü sıcaklık {digits} derece azalacak. | Son {num} günde {city+dat} {digits} milimetre yağmur düştü. |
        {city+loc} güneş {num} gün sonra yeniden görünecek. | {coach+ins} yola çıkacakların {cover+pl+3p+acc} almaları
        iyi olur."""),
    "falling": _templates("""yağmur | kar yağışı | sis | fırtına | dolu | sağanak yağış | gök gürültülü yağış | karla
        karışık yağmur | kuvvetli rüzgâr | don"""),
    "wind": _templates("kuzeyden | güneyden | doğudan | batıdan | kuzeydoğudan | güneybatıdan"),
    "fable_open": _templates("""Bir varmış, bir yokmuş; {wild+loc} {kindly} bir {animal1} yaşarmış. | Evvel zaman
        içinde {kindly} bir {animal1} ile {kindly} bir {animal2} varmış. | {water+gen} kıyısında {num} yavrusu olan
        {kindly} bir {animal1} yaşarmış. | Vaktiyle {wild+loc} bir {animal1}, {num} {animal2+ins} dostmuş."""),
    "fable": _templates("""{animal2}, “{=ben+dat} yardım eder misin?” diye sormuş. | {animal1} “{vp1+prog+P}, vaktim
        yok,” demiş. | {animal2} “{vp1+mak} istiyorum,” diye cevap vermiş. | {animal1+gen} {vp3+dik+3s+acc} gören
        {animal2} çok şaşırmış. | {season} gelince {animal1} {vp3+evid+P}. | {animal2} ise {vp3+evid+P}. | {animal1},
        {animal2+abl} daha {kindly} olduğunu sanırmış. | Sonunda {animal1} ile {animal2} {vp3+evid+P}. |
        “{vp2+not+cond+P} aç kalırsın,” demiş {animal2}. | {animal1} {num} gün boyunca {vp3+evid+P}. | Oysa {animal2},
        {animal1+gen} {vp3+acak+3s+acc} biliyormuş. | {animal+pl} bunu duyunca gülmüşler. | {animal1} {vp3+dik+3s+dat}
        çok pişman olmuş. | “{=sen+gen} gibi {kindly} bir {animal} görmedim,” demiş {animal1}."""),
    "fable_meet": _templates("""Bir gün {animal1}, {animal2+dat} rastlamış. | {season} gelince {animal1}, {wild+loc}
        {animal2+ins} karşılaşmış. | Günlerden bir gün {animal2}, {animal1+gen} evine gelmiş. | {animal1}, {wild+dat}
        giderken {animal2+acc} görmüş."""),
    "fable_close": _templates("""O günden sonra {animal1} bir daha {vp3+not+evid+P}. | {animal2} ile {animal1} ömür
        boyu dost kalmışlar. | {animal1} anlamış ki {vp3+madan} olmazmış. | İşte bu yüzden {animal1+pl}
        {animal2+pl+abl} kaçarmış."""),
    "ask": _templates("""– Adın ne? / – Adım {name}. / – Kaç yaşındasın? / – {number} yaşındayım. | – Nerede
        oturuyorsun? / – {city+loc} oturuyorum, ama {city+li+am}. | – {when_past} {vp2+past+P+q}? / – Evet,
        {again1+past+P}. | – {when_fut} {vp2+fut+P+q}? / – Hayır, {again1+not+fut+P}. | – {vp2+prog+P+q}? / – Bazen
        {again1+prog+P}. | – {vp2+ma+acc} sever misin? / – Evet, {family+1s+ins} sık sık {again1+aor+P}. | – En
        sevdiğin yemek nedir? / – {dish}. {family+1s} çok güzel yapar. | – {city1+q} daha {scenic}, {city2+q}? / –
        Bence {city1}. | – {=kim+dat} benziyorsun? / – {family+1s+dat} benziyorum. | – Baban ne iş yapıyor? / –
        {city+loc} {job}. | – Hiç {city+dat} gittin mi? / – Evet, {num} yıl önce {family+1s+ins} gittim. | – {=kim+ins}
        yaşıyorsun? / – {family+1s+ins}. | – {thing+2s} nerede? / – {surface+gen} {side}. | – Saat kaçta {vp2+aor+P}? /
        – {clock}. | – {vp2+abil+prog+P+q}? / – Ne yazık ki {again1+cannot+prog+P}. | – {vp2+imp2s} lütfen! / – Peki,
        {then} {again1+aor+P}. | – {lesson1+acc+q}, {lesson2+acc+q} daha çok seviyorsun? / – {lesson1+acc}, çünkü daha
        kolay. | – {vp2+must+P+q}? / – Evet, mutlaka {again1+must+P}."""),
    "side": _templates("üstünde | altında | arkasında | yanında | önünde"),
    "memory": _templates("""{name1} {lesson} derslerinde çok {kindly+were}. | {name2}, {lesson+acc} {lesson+abl} daha
        çok severdi. | Okulumuzun {scenic} bir bahçesi vardı. | Teneffüslerde {sport} oynardık. | {name2+ins} ben
        {vp4+hab+P}. | {name1} bize “{vp5+imp2p},” derdi. | Bir gün {name2} {thing+3s+acc} unuttu ve
        {vp3+cannot+past+P}. | {vp1+dik+1s+dat} {name1} çok kızmıştı. | Sınıfta {number} öğrenciydik. | {num} yıl sonra
        mezun olduk. | O günleri hatırladıkça {nostalgic} oluyorum. | {name2} şimdi {city+loc} {job}. | Karnemi alınca
        {family+1s} bana {plain} bir {gift} hediye ederdi. | {vp1+plup+P}, bu yüzden {moody+was}. | Ben {vp1+ken}
        {name2} {vp3+pcont+P}."""),
    "advice": _templates("""{lesson} sınavına hazırlanıyorsanız önce {vp5+imp2p}. | {vp3+mak} isteyen biri
        {vp3+must+P}. | {vp5+madan} önce mutlaka {vp5+imp2p}. | {num} saatten fazla {vp5+not+imp2p}. | {vp3+dikca}
        insan daha {kindly} olur. | {vp5+cond+P} {moody} olursunuz. | {vp3+mak}, {vp3+mak+abl} daha kolaydır. | İyi bir
        {job} hem {kindly} hem de {kindly} olmalıdır. | {vp3+not+an} kimse {vp3+cannot+aor+P}. | Her {weekday} günü
        {vp5+imp2p}. | {job+dat} danışmadan {vp5+not+imp2p}. | {idea+2p+acc} {*kaybet+not+imp2p}. | {idea+gen} değerini
        bilin. | {idea+acc} bulan, {idea+acc+da} bulur. | {idea} olmadan mutlu olunabilir mi?"""),
}

# Each plan: weight, settings, tense/person moods, the subject, steps: / for a new line, or a
# pool (pools joined by a comma): one of its templates, *least-most of them, or ~least-most in the pool's order.
PLANS: tuple[tuple[int, str, str, str, str], ...] = (
    (4, "home town school", "past/1s hab/1s aor/1s fut/1s prog/1s fut/1p past/1p hab/1p", "",
     "start act,deed*4-7 / talk*0-2 act,deed*2-3 close"),
    (5, "home town school nature", "past/3s evid/3s hab/3s prog/3s fut/3s aor/3s", "{name1}",
     "hero start act,deed*3-6 / talk*1-3 act,deed*1-3 close"),
    (2, "nature town home", "past/3p evid/3p hab/3p prog/3p", "{name1} ile {name2}",
     "pair deed,act*3-6 / talk deed*1-3"),
    (3, "town nature", "past/3s evid/3s fut/3s", "{name1}", "trip_open trip~4-7 / act,deed*2-4 talk*0-1 close"),
    (2, "home town nature school", "past/1s", "", "letter_open / letter~4-8 deed*1-3 / letter_close"),
    (2, "town", "past/3s", "{name1}", "shop_open / shop~3-6 / shop_close"),
    (2, "town", "aor/3s", "", "town_open town_text~5-10"),
    (2, "home", "aor/3s imp2p/3s", "", "recipe_open / recipe~5-9 / recipe_close"),
    (2, "town", "fut/3s", "", "weather_open weather*4-8"),
    (3, "fable", "evid/3s", "{animal1}", "fable_open deed*1-2 fable_meet fable~4-8 / deed*1-3 fable_close"),
    (2, "school", "past/1s hab/1s hab/1p", "", "memory_open memory~4-8 / act,deed*1-3"),
    (2, "home town school nature", "past/1s", "", "ask*4-7"),
    (1, "school home", "aor/3s", "", "advice*4-7"),
    (2, "home nature", "past/1s", "", "start talk*1-2 / ask*1-2 / act,deed*1-3 close"),
)
